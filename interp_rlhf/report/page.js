"use strict";
// Tables can be sorted by any column and filtered by text. Without scripts they are plain tables.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].textContent.trim();
      const number = (text) => (text === "" || text === "–" ? NaN : Number(text.replaceAll(",", "").replace(/\s?%$/, "")));
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [number(value(a)), number(value(b))];
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
        const order = Number.isNaN(x) ? value(a).localeCompare(value(b)) : x - y;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
  if (table.dataset.filter) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const shown = document.createElement("output");
    label.className = "filter";
    input.type = "search";
    label.append(table.dataset.filter + " ", input, shown);
    const frame = table.closest(".scroll");
    frame.before(label);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      let count = 0;
      for (const row of body.rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        count += row.hidden ? 0 : 1;
      }
      shown.textContent = wanted ? " " + count + " of " + body.rows.length : "";
    });
  }
}
