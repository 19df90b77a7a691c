"use strict";
// The figures of a page, drawn from the numbers that lie in it.
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const place of document.querySelectorAll("[data-figure]")) {
  const { data, layout } = figures[place.dataset.figure];
  Plotly.newPlot(place, data, layout, { displaylogo: false, responsive: true });
}
