"use strict";
// Numbers at a pointer or the keyboard, and tables that sort. The page is whole without it, save for these two.
const tip = document.getElementById("tip");
let now = [];

/** The element that has the words of a mark: of a text shown three times, the first copy has them. */
function worded(mark) {
  const copy = mark.closest("[data-copies]");
  if (!copy) return mark;
  const row = [...mark.parentElement.querySelectorAll("i")].indexOf(mark);
  return copies(mark)[0].querySelectorAll("i")[row];
}

function copies(mark) {
  return [...mark.closest("[data-copies]").querySelectorAll("[data-marks]")];
}

function forget() {
  now.forEach((mark) => mark.classList.remove("now"));
  now = [];
  tip.hidden = true;
}

function show(mark, x, y) {
  if (now[0] !== mark) {
    forget();
    const first = worded(mark);
    now = [mark];
    if (mark.closest("[data-copies]")) {
      const place = [...mark.parentElement.querySelectorAll("i")].indexOf(mark);
      now.push(...copies(mark).map((copy) => copy.querySelectorAll("i")[place]));
    }
    now.forEach((each) => each.classList.add("now"));
    tip.textContent = first.dataset.tip;
    tip.hidden = false;
  }
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 4))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18}px`;
}

function marksOf(group) {
  return [...group.querySelectorAll("[data-tip], i")];
}

function centre(mark) {
  const box = mark.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
}

function nearest(group, x, y) {
  let best = null, least = 900; // 30 pixels
  for (const mark of marksOf(group)) {
    const [left, top] = centre(mark);
    const distance = (left - x) ** 2 + (top - y) ** 2;
    if (distance < least) [best, least] = [mark, distance];
  }
  return best;
}

function pointed(event) {
  const group = event.target.closest?.("[data-marks]");
  if (!group) return forget();
  const direct = event.target.closest("[data-tip], i");
  const mark = direct || (group.dataset.marks === "direct" ? null : nearest(group, event.clientX, event.clientY));
  if (mark) show(mark, event.clientX, event.clientY);
  else forget();
}

/** The mark in the next row, or in the one before, that is nearest to the side. */
function across(marks, from, down) {
  const [x, y] = centre(from);
  const places = marks.map((mark) => {
    const box = mark.getBoundingClientRect();
    const rise = (box.top + box.height / 2 - y) * (down ? 1 : -1);
    return { mark, rise, aside: Math.max(0, box.left - x, x - box.right) };
  }).filter((place) => place.rise > 3);
  const next = Math.min(...places.map((place) => place.rise));
  const row = places.filter((place) => place.rise < next + 3);
  return row.reduce((best, place) => (best && best.aside <= place.aside ? best : place), null)?.mark ?? from;
}

function keyed(event) {
  if (event.key === "Escape") return forget();
  const group = event.target.closest?.("[data-marks]");
  if (!group || event.ctrlKey || event.metaKey || event.altKey) return;
  const marks = marksOf(group);
  const place = marks.indexOf(now.find((mark) => group.contains(mark)));
  const last = marks.length - 1;
  const goal = { ArrowRight: Math.min(place + 1, last), ArrowLeft: Math.max(place - 1, 0), Home: 0, End: last }[event.key];
  const isUp = event.key === "ArrowUp", isDown = event.key === "ArrowDown";
  if (goal === undefined && !isUp && !isDown) return;
  event.preventDefault();
  const mark = goal === undefined ? across(marks, marks[Math.max(place, 0)], isDown) : marks[goal];
  mark.scrollIntoView({ block: "nearest", inline: "nearest" });
  show(mark, ...centre(mark));
}

function sort(button) {
  const head = button.closest("th"), table = button.closest("table");
  const column = [...head.parentElement.children].indexOf(head);
  const isRising = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", isRising ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
  const isNumber = head.classList.contains("n");
  const order = (a, b) => {
    const [first, second] = [value(a), value(b)];
    if (!isNumber) return (isRising ? 1 : -1) * first.localeCompare(second, undefined, { numeric: true });
    if (first === "" || second === "") return (first === "") - (second === ""); // what is missing stays last
    return (isRising ? 1 : -1) * (Number(first) - Number(second));
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(order));
}

document.addEventListener("pointermove", pointed);
document.addEventListener("pointerdown", pointed);
document.addEventListener("keydown", keyed);
document.addEventListener("focusout", forget);
document.addEventListener("click", (event) => {
  const button = event.target.closest?.("th button");
  if (button) sort(button);
});
