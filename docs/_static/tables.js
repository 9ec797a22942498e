// Say above a table that is wider than the page that it scrolls; site.css keeps its first column in view.
const HINT = "wide-table-hint";

function mark(box) {
  const wide = box.scrollWidth > box.clientWidth + 1;
  box.classList.toggle("wide-table", wide);
  const shown = box.previousElementSibling?.classList.contains(HINT);
  if (wide && !shown) {
    const hint = document.createElement("p");
    hint.className = HINT;
    hint.textContent = `Scroll the table sideways: ${box.querySelector("tr").cells.length} columns →`;
    box.before(hint);
  } else if (!wide && shown) {
    box.previousElementSibling.remove();
  }
}

addEventListener("DOMContentLoaded", () => {
  const sizes = new ResizeObserver((changes) => changes.forEach((change) => mark(change.target)));
  document.querySelectorAll(".pst-scrollable-table-container").forEach((box) => sizes.observe(box));
});
