// Light or dark: the system's choice until somebody makes another.
const root = document.documentElement;
const stored = localStorage.getItem("erpo-theme");
if (stored) root.dataset.theme = stored;

document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("erpo-theme", root.dataset.theme);
  dispatchEvent(new Event("themechange"));
});
