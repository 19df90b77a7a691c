"use strict";
// What a token's numbers are: [coefficients, norms, loss effects] of every text, null where unknown.
const { excerpts, scales, ids } = JSON.parse(document.getElementById("data").textContent);
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

// From expert to expert

const link = (rel) => document.querySelector(`nav a[rel=${rel}]`);
const search = document.getElementById("search");
document.getElementById("find")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const query = search.value.trim();
  const id = Number(query);
  if (/^\d+$/.test(query) && ids.includes(id)) location.href = `expert-${id}.html`;
  else location.href = `../index.html#q=${encodeURIComponent(query)}`;
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
    select.value = String((Number(select.value) + 1) % 3);
    select.dispatchEvent(new Event("change"));
  } else return;
  event.preventDefault();
});
