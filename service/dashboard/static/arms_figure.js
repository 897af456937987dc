// Accuracy by arm with 95% intervals over problems, as an SVG that needs no style sheet: it is saved as it stands.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 720, HEIGHT = 380, LEFT = 54, RIGHT = 14, TOP = 60, BOTTOM = 62;
const FONT = "ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif";
const COLOURS = { high: "#c2410c", low: "#0f766e", random: "#7c6f64", random_matched: "#6d5bd0", same: "#2f6fd0" };
export const ARMS = {
  high: ["high entropy", "replaced"],
  low: ["low entropy", "replaced"],
  random: ["random token", "replaced"],
  random_matched: ["random, same place", "replaced"],
  same: ["high entropy", "kept, written anew"],
};

function add(parent, tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

export function armsFigure(result, { ink, ground, rule }) {
  const arms = Object.entries(result.arms);
  const svg = document.createElementNS(NS, "svg");
  const label = arms.map(([arm, a]) => `${ARMS[arm].join(" ")} ${(100 * a.accuracy.value).toFixed(1)}%`).join(", ");
  for (const [name, value] of Object.entries({ xmlns: NS, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": `Accuracy after a perturbation: ${label}`, "font-family": FONT })) svg.setAttribute(name, value);
  if (ground) add(svg, "rect", { width: WIDTH, height: HEIGHT, fill: ground });
  const y = (share) => TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  add(svg, "text", { x: LEFT, y: 22, fill: ink, "font-size": 14, "font-weight": 600 }, `Still right after a perturbation, ${result.num_problems} solved problems, 95% intervals over problems`);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) {
    add(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share), stroke: rule });
    add(svg, "text", { x: LEFT - 8, y: y(share) + 4, fill: ink, "font-size": 12, "text-anchor": "end" }, `${100 * share}%`);
  }
  const slot = (WIDTH - LEFT - RIGHT) / arms.length, bar = Math.min(74, slot * 0.6);
  arms.forEach(([arm, { accuracy, truncated }], index) => {
    const centre = LEFT + slot * (index + 0.5);
    add(svg, "rect", { x: centre - bar / 2, y: y(accuracy.value), width: bar, height: y(0) - y(accuracy.value), fill: COLOURS[arm], opacity: 0.85 });
    if (truncated) add(svg, "rect", { x: centre - bar / 2, y: y(Math.min(1, accuracy.value + truncated)), width: bar, height: y(0) - y(Math.min(1, truncated)), fill: "none", stroke: COLOURS[arm], "stroke-dasharray": "3 3" });
    add(svg, "path", { d: `M${centre} ${y(accuracy.low)}V${y(accuracy.high)}M${centre - 8} ${y(accuracy.low)}h16M${centre - 8} ${y(accuracy.high)}h16`, stroke: ink, "stroke-width": 1.6, fill: "none" });
    add(svg, "text", { x: centre, y: y(Math.max(accuracy.high, Math.min(1, accuracy.value + truncated))) - 7, fill: ink, "font-size": 13, "font-weight": 600, "text-anchor": "middle" }, `${(100 * accuracy.value).toFixed(1)}%`);
    ARMS[arm].forEach((line, row) => add(svg, "text", { x: centre, y: HEIGHT - BOTTOM + 20 + 15 * row, fill: ink, "font-size": 12, "text-anchor": "middle" }, line));
  });
  if (arms.some(([, a]) => a.truncated)) add(svg, "text", { x: LEFT, y: HEIGHT - 8, fill: ink, "font-size": 11 }, "dashed: cut at the length limit, counted as wrong");
  return svg;
}

const addressOf = (svg) => `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(svg))}`;
const PRINT = { ink: "#1d2330", ground: "#ffffff", rule: "#dddddd" };

export const svgAddress = (result) => addressOf(armsFigure(result, PRINT));

// The figure as a PNG of twice its size.
export async function pngAddress(result) {
  const image = new Image();
  image.src = svgAddress(result);
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [2 * WIDTH, 2 * HEIGHT];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/png");
}
