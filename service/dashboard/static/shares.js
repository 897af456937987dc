// Parts of a whole as one bar with its legend. Colours are classes: part-good, part-bad, part-warn, part-quiet.
import { el, number, percent } from "./dom.js";

export function shareBar(parts, label) {
  const shown = parts.filter(([, share]) => share > 0);
  return el("span", { class: "share-bar", role: "img", "aria-label": label || shown.map(([name, share]) => `${name} ${percent(share)}`).join(", ") },
    shown.map(([, share, tone]) => {
      const part = el("span", { class: `part-${tone}` });
      part.style.width = `${100 * share}%`;
      return part;
    }));
}

export function shareLegend(parts, show = percent) {
  return el("ul", { class: "plain share-legend" }, parts.map(([name, value, tone]) =>
    el("li", {}, el("span", { class: `share-key part-${tone}` }), el("span", {}, name), el("span", { class: "mono push" }, show === number ? number(value) : show(value)))));
}
