"use strict";
// Shown inside another page, as by <iframe src="expert-17.html?embed">, there is the expert alone.
if (new URLSearchParams(location.search).has("embed")) document.documentElement.classList.add("embed");
// What a token's numbers are: [coefficients, norms, loss effects] of every text, null where unknown.
// beside: the experts before and after this one in each order that the index can have.
const { excerpts, scales, beside } = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

// Numbers, shown beside the token that is pointed at or chosen

const shown = (value) => (value === null ? "unknown" : String(Number(value.toPrecision(4))));

// The positions that a piece of text stands for: several where a character is made of several tokens.
function tokensOf(span) {
  let first = 0;
  for (let s = span.previousElementSibling; s; s = s.previousElementSibling) first += Number(s.dataset.n || 1);
  return Array.from({ length: Number(span.dataset.n || 1) }, (_, i) => first + i);
}

function describe(span) {
  const [coefficients, norms, effects] = excerpts[span.parentElement.dataset.i];
  const tokens = tokensOf(span);
  const lines = [span.textContent.length > 60 ? span.textContent.slice(0, 60) + "\u2026" : span.textContent];
  for (const t of tokens) {
    if (tokens.length > 1) lines.push(`part ${t - tokens[0] + 1} of ${tokens.length}`);
    if (!coefficients[t]) lines.push("does not fire");
    else lines.push(`coefficient ${shown(coefficients[t])}`, `norm of its contribution ${shown(norms[t])}`);
    if (effects[t] !== null) lines.push(`loss without it ${effects[t] >= 0 ? "+" : ""}${shown(effects[t])} nats`);
  }
  return lines.join("\n");
}

function showTip(span) {
  tip.textContent = describe(span);
  tip.hidden = false;
  const [box, own] = [span.getClientRects()[0] || span.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.max(4, Math.min(box.left, document.documentElement.clientWidth - own.width - 8));
  const below = box.bottom + own.height + 8 < window.innerHeight;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 5 : box.top - own.height - 5) + window.scrollY}px`;
}

const tokenAt = (event) => event.target.closest?.(".excerpt > span");
document.addEventListener("mouseover", (event) => {
  const span = tokenAt(event);
  if (span) showTip(span);
  else tip.hidden = true;
});

// Tokens by keyboard

let chosen = null;
function choose(span) {
  chosen?.classList.remove("chosen");
  chosen = span;
  tip.hidden = true;
  if (!span) return;
  span.classList.add("chosen");
  span.scrollIntoView({ block: "nearest" });
  showTip(span);
}
document.addEventListener("focusin", (event) => {
  if (event.target.classList.contains("excerpt")) {
    choose(event.target.querySelector(".top") || event.target.firstElementChild);
  } else choose(null);
});
document.addEventListener("focusout", () => choose(null));

// Colours

function colour(quantity) {
  for (const text of document.querySelectorAll(".excerpt")) {
    const values = excerpts[text.dataset.i][quantity];
    let t = 0;
    for (const span of text.children) {
      let value = 0;
      for (let n = Number(span.dataset.n || 1); n > 0; n--, t++) {
        if (Math.abs(values[t]) > Math.abs(value)) value = values[t];
      }
      const level = Math.min(1, Math.abs(value) / scales[quantity]);
      span.classList.toggle("up", quantity === 2 && value > 0);
      span.classList.toggle("down", quantity === 2 && value < 0);
      if (level > 0) span.style.setProperty("--v", level.toFixed(3));
      else span.style.removeProperty("--v");
    }
  }
}
const select = document.getElementById("colour");
select.addEventListener("change", () => colour(Number(select.value)));
if (select.value !== "0") colour(Number(select.value)); // a browser keeps it over a reload

// Copying

function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  const done = () => {
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1200);
  };
  const bySelection = () => {
    getSelection().selectAllChildren(source);
    if (document.execCommand("copy")) done();
  };
  if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(done, bySelection);
  else bySelection();
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button));
}

// From expert to expert, in the order that the index had: it is kept in the address

const link = (rel) => document.querySelector(`nav a[rel=${rel}]:not([hidden])`);
const search = document.getElementById("search");
const state = new URLSearchParams(location.hash.slice(1));
const asHash = () => (state.size ? `#${state}` : "");
if (state.get("sort") in beside) {
  beside[state.get("sort")].forEach((n, i) => {
    const a = document.querySelector(`nav a[rel=${["prev", "next"][i]}]`);
    a.hidden = n === null;
    a.href = `expert-${n}.html`;
    a.querySelector("span").textContent = n;
  });
}
for (const a of document.querySelectorAll("nav a[href], .neighbours a")) {
  a.href = `${a.getAttribute("href")}${a.rel === "next" || a.rel === "prev" || a.rel === "up" ? asHash() : ""}`;
}
document.getElementById("find")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const query = search.value.trim();
  const found = new URLSearchParams({ q: query });
  if (state.has("sort")) found.set("sort", state.get("sort"));
  if (/^\d+$/.test(query)) found.set("go", "1"); // to this very expert, if there is one
  location.href = `../index.html#${found}`;
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (chosen && event.key === "ArrowRight") choose(chosen.nextElementSibling || chosen);
  else if (chosen && event.key === "ArrowLeft") choose(chosen.previousElementSibling || chosen);
  else if (event.key === "Escape") document.activeElement.blur();
  else if (event.key === "ArrowLeft" || event.key === "k") link("prev")?.click();
  else if (event.key === "ArrowRight" || event.key === "j") link("next")?.click();
  else if (event.key === "i") link("up")?.click();
  else if (event.key === "/" && search) search.focus();
  else if (event.key === "c") {
    select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
    select.dispatchEvent(new Event("change"));
  } else return;
  event.preventDefault();
});
