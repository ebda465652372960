// The scheme switch, keys, tokens offered in the search box, and the copy button. Every page works without this file.
"use strict";
const root = document.documentElement;
root.classList.add("js");
const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
const show = (theme) => { theme ? root.setAttribute("data-theme", theme) : root.removeAttribute("data-theme"); };
show(stored());

document.addEventListener("DOMContentLoaded", () => {
  const button = document.querySelector("[data-theme-switch]");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { if (button) button.textContent = dark() ? "Light" : "Dark"; };
  name();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  button?.addEventListener("click", () => {
    const theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", theme); } catch { /* no storage: this page only */ }
    show(theme);
    name();
  });

  document.addEventListener("keydown", (event) => {
    const typing = /^(input|textarea|select)$/i.test(event.target.tagName) || event.target.isContentEditable;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing) return;
    if (event.key === "/") {
      event.preventDefault();
      box?.focus();
      box?.select();
    }
    const link = { j: "next", ArrowRight: "next", k: "prev", ArrowLeft: "prev" }[event.key];
    if (link && !event.shiftKey) document.querySelector(`a[rel="${link}"]`)?.click();
  });

  for (const copy of document.querySelectorAll("[data-copy]")) {
    copy.addEventListener("click", async () => {
      const text = document.getElementById(copy.dataset.copy).textContent;
      const said = copy.textContent;
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = "Copied";
      } catch {
        const range = document.createRange();
        range.selectNodeContents(document.getElementById(copy.dataset.copy));
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        copy.textContent = "Selected: press Ctrl C";
      }
      setTimeout(() => { copy.textContent = said; }, 2000);
    });
  }

  const box = document.querySelector("[data-find]");
  const known = document.getElementById("known");
  let waiting = 0;
  box?.addEventListener("input", () => {
    clearTimeout(waiting);
    const text = box.value;
    if (text.trim().length < 2) return known.replaceChildren();
    waiting = setTimeout(async () => {
      const answer = await fetch(`/api/v1/tokens?limit=8&text=${encodeURIComponent(text.trim())}`).catch(() => null);
      if (!answer?.ok || box.value !== text) return;
      const found = (await answer.json()).filter((token) => token.text !== null);
      known.replaceChildren(...found.map((token) => new Option(token.shown, token.text)));
    }, 150);
  });
});
