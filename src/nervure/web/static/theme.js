// Runs before the page is painted, so that a chosen theme does not flash.
"use strict";
{
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* storage may be forbidden: the system's theme is taken */ }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
}
