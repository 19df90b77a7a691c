"use strict";
// Two quantities of every expert against each other, drawn once the table is there to be used.
{
  const { overview, figure, ids, names } = JSON.parse(document.getElementById("data").textContent);
  const plot = document.getElementById("overview");
  const axes = { x: document.getElementById("axis-x"), y: document.getElementById("axis-y") };
  const withPage = new Set(ids);
  const others = overview[axes.x.value].map((_, n) => n).filter((n) => !withPage.has(n));

  const chosen = () => {
    const layout = { ...figure.layout };
    for (const axis of ["x", "y"]) {
      const { label, log } = names[axes[axis].value];
      layout[`${axis}axis`] = { ...figure.layout[`${axis}axis`], title: { text: label }, type: log ? "log" : "linear" };
    }
    const traces = [others, ids].map((experts, i) => ({
      ...figure.data[i],
      x: experts.map((n) => overview[axes.x.value][n]),
      y: experts.map((n) => overview[axes.y.value][n]),
      customdata: experts,
    }));
    return [traces, layout];
  };
  const draw = () => Plotly.react(plot, ...chosen(), { displaylogo: false, responsive: true });
  const row = (n) => document.querySelector(`#experts a[href$="expert-${n}.html"]`);
  // After the first paint: the table does not wait for the figure.
  requestAnimationFrame(() => setTimeout(() => draw().then(() => {
    plot.dataset.drawn = "";
    plot.on("plotly_click", ({ points }) => row(points[0].customdata)?.click());
    plot.on("plotly_hover", ({ points }) => {
      const n = points[0].customdata;
      const cells = row(n)?.closest("tr").querySelectorAll("td.text");
      const promotes = cells ? `; promotes ${cells[0].textContent.trim()}` : "; no page";
      document.getElementById("hovered").textContent = `Expert ${n}${promotes}`;
    });
  })));
  axes.x.addEventListener("change", draw);
  axes.y.addEventListener("change", draw);
}
