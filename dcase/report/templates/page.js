"use strict";
// Everything is on the page without this: it only shows one device at a time, and sorts tables.
document.documentElement.classList.add("script");
const panels = [...document.querySelectorAll(".panel")];

function open(id) {
  const chosen = panels.find((panel) => panel.id === id) || panels[0];
  for (const panel of panels) panel.classList.toggle("open", panel === chosen);
  for (const link of document.querySelectorAll(".tabs a")) {
    if (chosen && link.hash === "#" + chosen.id) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function follow() {
  const id = decodeURIComponent(location.hash.slice(1));
  const target = id && document.getElementById(id);
  const panel = target && target.closest(".panel");
  if (panel) {
    open(panel.id);
    target.scrollIntoView();
  }
}

open("");
follow();
addEventListener("hashchange", follow);
for (const link of document.querySelectorAll(".tabs a")) {
  link.addEventListener("click", (event) => {
    event.preventDefault(); // the reader's place stays: the panel is right below
    history.replaceState(null, "", link.hash);
    open(link.hash.slice(1));
  });
}

function key(row, column) {
  const cell = row.children[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1; // "-" comes last
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const fixed = rows.filter((row) => row.children[0].textContent === "Macro average");
      const moved = rows.filter((row) => !fixed.includes(row));
      moved.sort((a, b) => compare(key(a, column), key(b, column)) * (down ? -1 : 1));
      table.tBodies[0].append(...moved, ...fixed);
    });
  });
}
