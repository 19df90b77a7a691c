"use strict";
// Two quantities of every expert against each other, drawn once the table is there to be used.
{
  const { overview, figure, ids, names } = JSON.parse(document.getElementById("data").textContent);
  const plot = document.getElementById("overview");
  const axes = { x: document.getElementById("axis-x"), y: document.getElementById("axis-y") };
  const withPage = new Set(ids);
  const others = overview[axes.x.value].map((_, n) => n).filter((n) => !withPage.has(n) && overview.density?.[n] !== 0); // a dead expert is not drawn

  const chosen = () => {
    const layout = { ...figure.layout };
    for (const axis of ["x", "y"]) {
      const { label, log } = names[axes[axis].value];
      layout[`${axis}axis`] = { ...figure.layout[`${axis}axis`], title: { text: label } };
      if (log) Object.assign(layout[`${axis}axis`], { type: "log", dtick: 1, exponentformat: "power" });
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
  const start = () => {
    // Its text lies in the page and is run now: as a script of the page the table would wait for it.
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
    for (const axis of ["x", "y"]) axes[axis].addEventListener("change", draw);
    draw().then(() => {
      plot.dataset.drawn = "";
      plot.on("plotly_click", ({ points }) => row(points[0].customdata)?.click());
      plot.on("plotly_hover", ({ points }) => {
        const n = points[0].customdata;
        const promotes = row(n)?.closest("tr").querySelector("td.promotes").textContent.trim();
        const known = row(n) ? `; promotes ${promotes}` : "; no page";
        document.getElementById("hovered").textContent = `Expert ${n}${known}`;
      });
    });
  };
  requestAnimationFrame(() => setTimeout(start)); // after the first paint
}
