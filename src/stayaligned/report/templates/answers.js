"use strict";
// The table of all completions shows one page of rows at a time. Cells are set as text, never as markup.
const held = document.getElementById("every-answer");
if (held) {
  const { alphabet, columns, prompts, runs } = JSON.parse(held.textContent);
  // A column is null, [values, one character per row], or the plain list of its values (see report/completions.py).
  const unpack = (column, n) => {
    if (column === null) return Array(n).fill(null);
    const packed = column.length === 2 && Array.isArray(column[0]);
    return packed ? Array.from(column[1], (code) => column[0][alphabet.indexOf(code)]) : column;
  };
  const asked = prompts.map(([ids, ...others]) => [ids, ...others.map((column) => unpack(column, ids.length))]);
  const rows = runs.flatMap((run) => {
    const [ids, sets, categories] = asked[run.prompts];
    const cells = run.cells.map((column) => unpack(column, ids.length));
    return ids.map((id, i) => [id, run.arm, run.seed, sets[i], categories[i], ...cells.map((column) => column[i])]);
  });
  const size = 100;
  const place = document.getElementById("every-answer-table");
  const make = (name, parent, text) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const label = make("label", place, "Show rows that contain ");
  const filter = make("input", label);
  filter.type = "search";
  const status = make("p", place);
  status.setAttribute("role", "status");
  const scroll = make("div", place);
  scroll.className = "scroll";
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "Table of all completions");
  const table = make("table", scroll);
  make("caption", table, "One row per completion; click a heading to sort.");
  const heads = make("tr", make("thead", table));
  const body = make("tbody", table);
  const turns = make("p", place);
  const turn = (text, step) => {
    const button = make("button", turns, text);
    button.type = "button";
    button.addEventListener("click", () => { first += step * size; draw(); });
    return button;
  };
  const back = turn("Previous page", -1);
  const forward = turn("Next page", 1);
  let shown = rows;
  let first = 0;
  const compare = (x, y) => (typeof x === "number" && typeof y === "number" ? x - y : x < y ? -1 : x > y ? 1 : 0);
  const draw = () => {
    first = Math.max(0, Math.min(first, shown.length - 1 - ((shown.length - 1) % size)));
    body.replaceChildren(...shown.slice(first, first + size).map((row) => {
      const line = make("tr");
      row.forEach((cell, column) => {
        const made = make(column ? "td" : "th", line, cell === null ? "" : String(cell));
        if (column === 0) made.scope = "row";
        made.className = "left";
      });
      return line;
    }));
    const last = Math.min(first + size, shown.length);
    status.textContent = shown.length ? `Rows ${first + 1} to ${last} of ${shown.length}` : "No matching rows";
    back.disabled = first === 0;
    forward.disabled = last === shown.length;
  };
  const order = () => {
    const wanted = filter.value.toLowerCase();
    shown = wanted ? rows.filter((row) => row.some((cell) => String(cell).toLowerCase().includes(wanted))) : rows.slice();
    const head = heads.querySelector("[aria-sort]");
    if (head) {
      const column = head.cellIndex;
      const sign = head.getAttribute("aria-sort") === "descending" ? -1 : 1;
      shown.sort((a, b) => {
        const [x, y] = [a[column], b[column]];
        return x === null || y === null ? (x === null) - (y === null) : sign * compare(x, y);
      });
    }
    first = 0;
    draw();
  };
  columns.forEach((title) => {
    const head = make("th", heads);
    head.scope = "col";
    head.className = "left";
    const button = make("button", head, title);
    button.type = "button";
    button.addEventListener("click", () => {
      const next = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      for (const other of heads.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      order();
    });
  });
  filter.addEventListener("input", order);
  draw();
}
