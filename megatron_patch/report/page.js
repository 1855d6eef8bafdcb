"use strict";
for (const head of document.querySelectorAll("thead tr")) {
  [...head.cells].forEach((cell, column) => cell.firstChild.addEventListener("click", () => {
    const sign = cell.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const compare = (a, b) => {
      const [p, q] = [a.cells[column], b.cells[column]];
      const [x, y] = [Number(p.dataset.value), Number(q.dataset.value)];
      if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // what is no number comes last
      return sign * (x - y || p.textContent.localeCompare(q.textContent, undefined, {numeric: true}));
    };
    const body = head.closest("table").tBodies[0];
    body.append(...[...body.rows].sort(compare));
  }));
}

// Values under the pointer: of the nearest point of a line, or of a cell.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const readable = value => String(Number(value.toPrecision(4)));
function value(at, [from, to, low, high, scale]) { // of a place on an axis
  const share = (at - from) / (to - from);
  return scale === "log" ? low * (high / low) ** share : low + share * (high - low);
}
function points(svg) { // [x, y, text] of all points of all lines, read off their paths
  if (svg.points) return svg.points;
  const plots = JSON.parse(svg.dataset.plots);
  svg.points = [];
  for (const line of svg.querySelectorAll(".hover")) {
    const [name, texts] = JSON.parse(line.dataset.hover);
    const path = [...line.children].find(child => child.tagName === "path");
    const places = path
      ? [...path.getAttribute("d").matchAll(/[ML] ?(-?[\d.]+) (-?[\d.]+)/g)].map(found => [Number(found[1]), Number(found[2])])
      : [...line.querySelectorAll("use")].map(mark => [Number(mark.getAttribute("x")), Number(mark.getAttribute("y"))]);
    for (const [place, [x, y]] of places.entries()) {
      const [across, up, label] = plots[0];
      const text = texts ? texts[place] : `${label} ${readable(Math.round(value(x, across)))}: ${readable(value(y, up))}`;
      svg.points.push([x, y, `${name}\n${text}`]);
    }
  }
  return svg.points;
}
function show(svg, event) {
  const cells = event.target.closest(".cells");
  const drawn = cells ? [...cells.querySelectorAll("use, path:not(defs *)")] : []; // a few cells have a path each
  let text = cells && JSON.parse(cells.dataset.hover)[drawn.indexOf(event.target)];
  if (!cells) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let nearest = 18; // points of the picture
    for (const [x, y, said] of points(svg)) {
      const distance = Math.hypot(x - at.x, y - at.y);
      if (distance < nearest) [nearest, text] = [distance, said];
    }
  }
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${scrollX + Math.max(4, Math.min(event.clientX + 12, room))}px`;
  tip.style.top = `${scrollY + event.clientY + 16}px`;
}
for (const svg of document.querySelectorAll("svg[data-plots]")) {
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, event => show(svg, event));
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
