// The JSON API, as any client uses it.

export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail || problem.title || `The service answered ${status}`);
    this.status = status;
    this.problem = problem;
  }
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new ApiError(0, { title: "The service cannot be reached" });
  }
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) askForKey();
  if (!response.ok) throw new ApiError(response.status, body);
  return body;
}

export const getJson = (path) => call(path, { headers: { Accept: "application/json" } });

export const postJson = (path, body = {}) =>
  call(path, {
    method: "POST",
    headers: { Accept: "application/json", "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });

export function query(values) {
  const pairs = Object.entries(values).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return pairs.length ? "?" + new URLSearchParams(pairs) : "";
}

// Follow a job's events. `on` maps an event type to a function of the envelope; the stream resumes by itself after a
// lost connection (the browser sends Last-Event-ID) and is closed after the job's end.
export function follow(jobId, on, onClosed = () => {}) {
  const source = new EventSource(`/jobs/${encodeURIComponent(jobId)}/events`);
  for (const [type, handler] of Object.entries(on)) {
    source.addEventListener(type, (event) => handler(JSON.parse(event.data)));
  }
  source.addEventListener("end", () => {
    source.close();
    onClosed();
  });
  return source;
}

export function showNotice(message) {
  const box = document.getElementById("notice");
  box.textContent = message || "";
  box.hidden = !message;
}

// A service with keys: the key becomes a cookie (POST /session) that scripts cannot read.
function askForKey() {
  const form = document.getElementById("sign-in");
  if (!form.hidden) return;
  form.hidden = false;
  form.elements.key.focus();
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await postJson("/session", { key: form.elements.key.value });
      location.reload();
    } catch (error) {
      showNotice(error.message);
    }
  });
}
