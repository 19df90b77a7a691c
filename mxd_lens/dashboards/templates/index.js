"use strict";
// values: a column's numbers, a row each; texts: what a row is searched by; ids: which expert it is.
const { ids, values, texts } = JSON.parse(document.getElementById("data").textContent);
const body = document.querySelector("#experts tbody");
const rows = [...body.rows];
const search = document.getElementById("search");
const state = new URLSearchParams(location.hash.slice(1)); // kept in the address: Back finds it again

function remember(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  history.replaceState(null, "", `#${state}`);
}

// A page that is opened from here knows the order: its next one is the next here.
body.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (link) link.href = link.getAttribute("href").split("#")[0] + (state.size ? `#${state}` : "");
}, true);

// Search: every word must be in the row's text; a number is an id, or the beginning of one

function find() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let n = 0;
  rows.forEach((row, i) => {
    const hit = words.every((word) => `${ids[i]}`.startsWith(word) || texts[i].includes(word));
    row.hidden = !hit;
    n += hit;
  });
  document.getElementById("found").textContent = words.length ? `${n.toLocaleString("en")} found` : "";
  move(null);
}
search.addEventListener("input", () => {
  find();
  remember("q", search.value);
});

// Sorting: largest first, except by id; unknown numbers last

function sort(column, descending) {
  const known = (i) => values[column][i] !== null;
  const order = rows.map((_, i) => i).sort((i, j) => {
    if (!known(i) || !known(j)) return known(j) - known(i);
    return (values[column][i] - values[column][j]) * (descending ? -1 : 1);
  });
  body.append(...order.map((i) => rows[i]));
  for (const head of document.querySelectorAll("#experts th[data-column]")) {
    if (head.dataset.column === column) head.ariaSort = descending ? "descending" : "ascending";
    else head.removeAttribute("aria-sort");
  }
  remember("sort", (descending ? "-" : "") + column);
}
for (const head of document.querySelectorAll("#experts th[data-column]")) {
  head.querySelector("button").addEventListener("click", () => {
    const { column } = head.dataset;
    sort(column, head.ariaSort ? head.ariaSort === "ascending" : column !== "expert");
    move(null);
  });
}

// By keyboard

let current = null;
function move(row) {
  current?.classList.remove("current");
  current = row;
  row?.classList.add("current");
  row?.scrollIntoView({ block: "nearest" });
}
function step(direction) {
  let row = current ? current[direction] : body.firstElementChild;
  while (row?.hidden) row = row[direction];
  if (row) move(row);
}
function open() {
  const exact = rows[ids.indexOf(Number(search.value || NaN))];
  const row = current || exact || [...body.rows].find((r) => !r.hidden);
  row?.querySelector("a").click();
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === search;
  if (!typing && event.target.matches("select, button, a")) return;
  if (event.key === "ArrowDown" || (event.key === "j" && !typing)) step("nextElementSibling");
  else if (event.key === "ArrowUp" || (event.key === "k" && !typing)) step("previousElementSibling");
  else if (event.key === "Enter" && (typing || current)) open();
  else if (event.key === "/" && !typing) search.focus();
  else if (event.key === "Escape" && typing && search.value) {
    search.value = "";
    search.dispatchEvent(new Event("input"));
  } else if (event.key === "Escape") search.blur();
  else return;
  event.preventDefault();
});

if (state.has("sort")) {
  const column = state.get("sort").replace(/^-/, "");
  if (column in values) sort(column, state.get("sort").startsWith("-"));
}
search.value = state.get("q") || "";
if (state.has("go")) {
  state.delete("go");
  const exact = rows[ids.indexOf(Number(search.value))];
  if (exact) {
    const { sort: by } = Object.fromEntries(state);
    location.replace(exact.querySelector("a").getAttribute("href") + (by ? `#sort=${by}` : ""));
  }
  history.replaceState(null, "", `#${state}`);
}
find();
body.dataset.ready = "";
