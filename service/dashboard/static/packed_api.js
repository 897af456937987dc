// In place of api.js in a page that was saved as one file: answers come from the file itself.

const answers = JSON.parse(document.getElementById("answers").textContent);

export class ApiError extends Error {}

export async function getJson(path) {
  if (path in answers) return answers[path];
  throw new ApiError("This saved page does not hold that part of the analysis");
}

export async function postJson() {
  throw new ApiError("A saved page orders nothing: open the analysis in the service");
}

export function query(values) {
  const pairs = Object.entries(values).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return pairs.length ? "?" + new URLSearchParams(pairs) : "";
}

export const follow = () => null;

export function showNotice(message) {
  const box = document.getElementById("notice");
  box.textContent = message || "";
  box.hidden = !message;
}
