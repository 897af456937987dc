// Scales of the token view. Sequential ones fall in lightness all along; the diverging one is pale at zero.

const HEAT = ["#ffffcc", "#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#bd0026", "#800026"];
const CIVIDIS = ["#fee838", "#e1cc55", "#c3b369", "#a59c74", "#8a8678", "#707173", "#575d6d", "#35456c", "#00224e"];
const DIVERGING = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"];
export const UNKNOWN = [222, 222, 222];

const parse = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const STOPS = { heat: HEAT.map(parse), cividis: CIVIDIS.map(parse), diverging: DIVERGING.map(parse) };

export function colourAt(palette, share) {
  const stops = STOPS[palette];
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const index = Math.min(Math.floor(place), stops.length - 2);
  const rest = place - index;
  return stops[index].map((from, i) => Math.round(from + (stops[index + 1][i] - from) * rest));
}

// Colour of a value on a fixed domain [low, high]; what lies outside is clamped.
export function colourOf(value, [low, high], palette) {
  if (value === null || value === undefined || Number.isNaN(value)) return UNKNOWN;
  return colourAt(palette, (value - low) / (high - low));
}

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => {
    const part = c / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Black or white, whichever reads better: never below 4.58 to 1.
export function inkOn(rgb) {
  const light = luminance(rgb);
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000" : "#fff";
}

export const CHANNELS = {
  entropy: { label: "Entropy", unit: "nats", sign: "H", domains: [0.5, 1, 2, 3, 5, 12], about: "Entropy of the whole next-token distribution" },
  entropy_low: { label: "Entropy, at least", unit: "nats", sign: "H ≥", domains: [0.5, 1, 2, 3, 5, 12], about: "The least entropy that the given top log-probs allow" },
  entropy_high: { label: "Entropy, at most", unit: "nats", sign: "H ≤", domains: [0.5, 1, 2, 3, 5, 12], about: "The greatest entropy that the given top log-probs allow" },
  logp: { label: "Log-prob", unit: "nats", sign: "log p", negative: true, domains: [1, 2, 5, 10, 20], about: "Log-probability of the token that was written" },
  progress: { label: "Progress", unit: "nats", sign: "s", diverging: true, domains: [0.1, 0.5, 1, 3, 10], about: "log p − log p under the reference model" },
  kl: { label: "KL", unit: "nats", sign: "KL", domains: [0.01, 0.05, 0.1, 0.5, 1, 3], about: "Estimate k3 of the divergence from the reference model" },
  gate: { label: "Gate", sign: "W", domains: [1], about: "Entropy gate of eq. 8" },
  normalized_progress: { label: "Norm. progress", sign: "s̃", diverging: true, domains: [1, 2, 3, 5], about: "Progress standardised within its bucket (eq. 9)" },
  psi: { label: "Shift", sign: "Ψ", diverging: true, domains: [1, 2, 3, 5], about: "Anchored, gated shift of the advantage (eq. 10)" },
  advantage: { label: "Advantage", sign: "Â", diverging: true, domains: [1, 2, 3, 5, 10], about: "Final advantage of the token" },
  leverage: { label: "Leverage", sign: "ℓ", domains: [0.5, 1, 2, 3, 5, 10], about: "How strongly the token pulls on the update" },
  difference: { label: "ΔH", unit: "nats", sign: "ΔH", diverging: true, domains: [0.1, 0.5, 1, 2, 5], about: "Entropy in the other analysis − entropy here, of the same tokens" },
  varentropy: { label: "Varentropy", unit: "nats²", sign: "V", domains: [1, 2, 5, 10], about: "Variance of the surprisal" },
  top_prob: { label: "Top prob.", sign: "p₁", reversed: true, domains: [1], about: "Probability of the most likely token" },
  rank: { label: "Rank", sign: "rank", domains: [1, 5, 20, 100], about: "Rank of the token that was written; 0 is the most likely" },
};

// The domain as [low, high] for the chosen upper end; `flip` says that the low end is the remarkable one.
export function domainOf(name, top) {
  const channel = CHANNELS[name] || {};
  if (channel.diverging) return [-top, top];
  if (channel.negative) return [0, -top];
  return channel.reversed ? [top, 0] : [0, top];
}

export const paletteOf = (name, chosen) => (CHANNELS[name]?.diverging ? "diverging" : chosen);

// The smallest offered end that holds 98% of the values.
export function defaultTop(name, values) {
  const offered = CHANNELS[name]?.domains || [1];
  const sizes = values.filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
  const peak = sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.98 * sizes.length))] : 0;
  return offered.find((top) => peak <= top) ?? offered[offered.length - 1];
}
