// Tokens as coloured cells: one element a cell, one tab stop for all of them, events on their parent.
import { colourOf, css, inkOn } from "./colour.js";
import { el, number, visible } from "./dom.js";

export class TokenView {
  constructor(root, { onPoint }) {
    this.root = root;
    this.onPoint = onPoint;
    this.current = null;
    root.addEventListener("pointerover", (event) => this.over(event));
    root.addEventListener("focusin", (event) => this.over(event));
    root.addEventListener("click", (event) => {
      const cell = event.target.closest(".token");
      if (cell) this.focus(Number(cell.dataset.first));
    });
  }

  over(event) {
    const cell = event.target.closest(".token");
    if (!cell) return;
    this.point(Number(cell.dataset.first));
  }

  // Several tokens may form one character: their texts are empty but for one, and they share its cell.
  show(data) {
    this.data = data;
    this.current = null;
    this.pivots = data.pivots.map((p) => p.position - (data.start || 0)).sort((a, b) => a - b);
    const marked = new Set(this.pivots);
    this.cells = [];
    data.tokens.forEach((text, position) => {
      if (text === "" && this.cells.length) this.cells[this.cells.length - 1].positions.push(position);
      else this.cells.push({ text, positions: [position] });
    });
    this.cellOf = [];
    const parts = document.createDocumentFragment();
    for (const cell of this.cells) {
      for (const position of cell.positions) this.cellOf[position] = cell;
      cell.isPivot = cell.positions.some((position) => marked.has(position));
      cell.node = el("span", { class: cell.isPivot ? "token is-pivot" : "token", tabindex: "-1", role: "img", dataset: { first: cell.positions[0] } });
      this.fill(cell, parts);
    }
    if (this.cells.length) this.cells[0].node.tabIndex = 0;
    this.root.replaceChildren(parts);
  }

  // A break is marked where it stands, and made after its cell: the cell itself stays in one piece.
  fill(cell, parts) {
    const shown = cell.text.trim() === "" && cell.text !== "" ? cell.text.replace(/ /g, "␣") : cell.text;
    const lines = visible(shown).split("\n");
    cell.node.textContent = lines.join("↵");
    parts.append(cell.node);
    for (let i = 1; i < lines.length; i += 1) parts.append("\n");
  }

  colour(values, domain, palette) {
    const reversed = domain[0] > domain[1];
    for (const cell of this.cells) {
      const known = cell.positions.map((position) => values[position]).filter((v) => v !== null && v !== undefined);
      const far = reversed || domain[1] < 0 ? Math.min(...known) : known.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), known[0]);
      const value = known.length ? far : null;
      const ground = colourOf(value, domain, palette);
      cell.node.style.backgroundColor = css(ground);
      cell.node.style.color = inkOn(ground);
      const { entropy: exact, entropy_low: low } = this.data.channels;
      const entropy = (exact ?? low)?.[cell.positions[0]];
      cell.node.setAttribute("aria-label", `${cell.text.trim() || "blank"}, token ${cell.positions[0]}, entropy ${exact ? "" : "at least "}${number(entropy)}` +
        (value !== entropy ? `, value ${number(value)}` : "") + (cell.isPivot ? ", pivot" : ""));
    }
  }

  point(position) {
    if (position === this.current || !this.cellOf[position]) return;
    this.cellOf[this.current]?.node.classList.remove("is-current");
    this.current = position;
    this.cellOf[position].node.classList.add("is-current");
    this.onPoint(position);
  }

  focus(position) {
    const cell = this.cellOf[position];
    if (!cell) return;
    for (const other of this.root.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
    cell.node.tabIndex = 0;
    cell.node.focus({ preventScroll: true });
    cell.node.scrollIntoView({ block: "nearest" });
    this.point(position);
  }

  // Keys of the whole page; false if the key is not one of ours.
  key(key, target) {
    const last = this.cells.length - 1;
    const here = this.current === null ? -1 : this.cells.indexOf(this.cellOf[this.current]);
    const inside = this.root.contains(target) || target === document.body || target.id === "main";
    if (key === "n" || key === "p") return this.toPivot(key === "n");
    if (!inside) return false;
    const next = { ArrowRight: here + 1, ArrowLeft: Math.max(0, here - 1), Home: 0, End: last }[key];
    if (next !== undefined) {
      this.focus(this.cells[Math.min(last, next)].positions[0]);
      return true;
    }
    if (key === "ArrowDown" || key === "ArrowUp") return this.toLine(key === "ArrowDown", here);
    return false;
  }

  toPivot(forward) {
    if (!this.pivots.length) return true;
    const at = this.current ?? -1;
    const wanted = forward
      ? this.pivots.find((p) => this.cellOf[p] !== this.cellOf[at] && p > at) ?? this.pivots[0]
      : this.pivots.findLast((p) => this.cellOf[p] !== this.cellOf[at] && p < at) ?? this.pivots[this.pivots.length - 1];
    this.focus(wanted);
    return true;
  }

  // The nearest cell of the line below or above.
  toLine(down, here) {
    if (here < 0) { this.focus(0); return true; }
    const from = this.cells[here].node.getBoundingClientRect();
    const centre = from.left + from.width / 2;
    let line = null, best = null, distance = Infinity;
    for (let i = here + (down ? 1 : -1); i >= 0 && i < this.cells.length; i += down ? 1 : -1) {
      const box = this.cells[i].node.getClientRects()[0];
      if (!box || Math.abs(box.top - from.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      const away = Math.abs(box.left + box.width / 2 - centre);
      if (away < distance) { distance = away; best = i; }
    }
    if (best !== null) this.focus(this.cells[best].positions[0]);
    return true;
  }
}
