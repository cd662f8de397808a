"use strict";

function themeButton() {
  const button = document.getElementById("theme");
  const dark = () => document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  label();
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("theme", document.documentElement.dataset.theme); } catch { /* not kept, still shown */ }
    label();
  });
}

// A paper is shown while every word of the query begins a word of its text.
function filterPapers() {
  const form = document.getElementById("filters");
  const list = document.getElementById("papers");
  if (!form || !list) return;
  const address = new URL(location.href);
  const narrowed = ["q", "family", "state", "outcome"].some((name) => address.searchParams.get(name));
  // What the server has filtered is not all there is to filter: then the form is sent as without script.
  if (narrowed && form.querySelector("button").hidden === false) {
    form.addEventListener("change", () => form.submit());
    return;
  }
  const items = [...list.children];
  const texts = items.map((item) => ` ${item.dataset.text.replace(/[^\p{L}\p{N}]+/gu, " ")} `);
  const show = () => {
    const words = form.q.value.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
    let count = 0;
    items.forEach((item, n) => {
      const fits = words.every((word) => texts[n].includes(` ${word}`))
        && (!form.family.value || item.dataset.family === form.family.value)
        && (!form.state.value || item.dataset.state === form.state.value)
        && (!form.outcome.value || item.dataset.outcomes.split("|").includes(form.outcome.value));
      item.hidden = !fits;
      count += fits;
    });
    document.querySelector("#count strong").textContent = count;
    document.getElementById("nothing").hidden = count > 0;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

function sortTables(root) {
  for (const table of root.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (head.querySelector(".hidden")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const cell = row.cells[column];
          const text = cell.dataset.value ?? cell.textContent.trim().replaceAll(",", "");
          const value = text === "" ? NaN : Number(text);
          return Number.isNaN(value) ? (cell.dataset.value === undefined ? text : "") : value;
        };
        const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
        const rows = [...body.rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1));
        body.append(...rows);
      });
    });
  }
}

function followStarted() {
  const place = document.getElementById("started");
  if (!place) return;
  const source = new EventSource(place.dataset.events);
  source.onmessage = (event) => {
    const job = JSON.parse(event.data);
    document.getElementById("state").textContent = job.state;
    document.getElementById("bar").value = job.share;
    document.getElementById("text").textContent = [job.left, job.text].filter(Boolean).join(" · ");
    if (job.run && !document.querySelector("#result a")) {
      const link = document.createElement("a");
      link.href = job.run;
      link.textContent = "See what was measured";
      document.getElementById("result").append(link);
    }
    if (job.error) {
      const error = document.getElementById("error");
      error.textContent = job.error;
      error.hidden = false;
    }
    if (job.ended) {
      source.close();
      document.getElementById("stop")?.remove();
    }
  };
}

// A run's page follows the store: a new record brings new tables and plots.
function followRun() {
  const place = document.getElementById("part");
  if (!place?.dataset.events) return;
  const source = new EventSource(place.dataset.events);
  source.onmessage = async () => {
    const answer = await fetch(place.dataset.part);
    if (!answer.ok) return;
    place.innerHTML = await answer.text();
    sortTables(place);
  };
}

themeButton();
filterPapers();
sortTables(document);
followStarted();
followRun();
