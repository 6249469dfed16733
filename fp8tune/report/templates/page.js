"use strict";
// The page reads well without this. With it tables are sorted, filtered and unfolded,
// and only so many rows are laid out at a time, since ten thousand take seconds.
(() => {
  const AT_A_TIME = 200;

  const theme = document.getElementById("theme");
  theme.parentElement.hidden = false;
  theme.addEventListener("change", () => {
    if (theme.value) document.documentElement.dataset.theme = theme.value;
    else delete document.documentElement.dataset.theme;
  });

  for (const form of document.querySelectorAll("form[data-for]")) {
    enhance(document.getElementById(form.dataset.for), form);
  }

  function enhance(table, form) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const keys = headings.map((x) => x.dataset.key);
    const rest = document.querySelector(`details[data-for="${table.id}"]`);
    const rows = [...body.rows, ...(rest ? rest.querySelectorAll("tbody > tr") : [])];
    if (rest) rest.remove();
    const folded = rows.map((tr) => readRow(tr));
    const total = folded.reduce((sum, item) => sum + item.names.length, 0);
    let unfolded = null; // made when it is first asked for
    let order = null; // {column, sign}
    let shown = AT_A_TIME;
    let items = folded;

    const more = document.createElement("button");
    more.type = "button";
    more.className = "more";
    table.parentElement.after(more);
    more.addEventListener("click", () => {
      shown += AT_A_TIME;
      draw();
    });
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => sortBy(column));
    });
    form.hidden = false;
    form.addEventListener("input", refresh);
    form.addEventListener("reset", () => setTimeout(refresh));
    form.addEventListener("submit", (event) => event.preventDefault());
    addEventListener("beforeprint", () => {
      shown = Infinity;
      draw();
    });
    refresh();

    function readRow(tr) {
      const [name, ...cells] = tr.cells;
      const names = name.querySelector("pre");
      const pattern = name.firstChild.textContent.trim();
      return {
        tr,
        name: pattern,
        names: names ? names.textContent.split("\n") : [pattern],
        texts: [pattern, ...cells.map((x) => x.textContent.trim())],
      };
    }

    function unfold() {
      return folded.flatMap((item) =>
        item.names.map((name) => ({ ...item, name, names: [name], tr: null, of: item.tr })),
      );
    }

    // A row of a single layer is made when it is first laid out.
    function elementOf(item) {
      if (item.tr === null) {
        item.tr = item.of.cloneNode(true);
        item.tr.cells[0].querySelector("pre")?.parentElement.remove();
        item.tr.cells[0].firstChild.textContent = item.name;
      }
      return item.tr;
    }

    function sortBy(column) {
      const again = order && order.column === column;
      order = { column, sign: again ? -order.sign : 1 };
      headings.forEach((heading, i) => {
        if (i === column) {
          heading.setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
        } else heading.removeAttribute("aria-sort");
      });
      refresh();
    }

    function refresh() {
      const wanted = Object.fromEntries(new FormData(form));
      const all = wanted.unfold ? (unfolded ??= unfold()) : folded;
      items = all.filter((item) => fits(item, wanted));
      if (order) items.sort((a, b) => order.sign * compare(textOf(a), textOf(b)));
      shown = AT_A_TIME;
      draw();
    }

    function textOf(item) {
      return order.column === 0 ? item.name : item.texts[order.column];
    }

    function fits(item, wanted) {
      return Object.entries(wanted).every(([field, value]) => {
        if (value === "" || field === "unfold") return true;
        if (field === "name") {
          const part = value.toLowerCase();
          return [item.name, ...item.names].some((x) => x.toLowerCase().includes(part));
        }
        const text = item.texts[keys.indexOf(field)];
        return /^[MKN]$/.test(field) ? hasSize(text, value) : text.split(" / ").includes(value);
      });
    }

    // "17,8192", "12..812" or "64 of 512" against "4096", "1024-8192", ">=1024" or a list of these.
    function hasSize(text, value) {
      const sizes = text.match(/\d+/g)?.map(Number) ?? [];
      return value.split(",").some((part) => {
        const numbers = part.match(/\d+/g)?.map(Number) ?? [];
        if (!numbers.length) return false;
        const [low, high = low] = numbers;
        if (text.includes("..")) {
          const [first, last] = sizes;
          if (part.includes(">")) return last >= low;
          if (part.includes("<")) return first <= low;
          return first <= high && low <= last;
        }
        if (part.includes(">")) return sizes.some((x) => x >= low);
        if (part.includes("<")) return sizes.some((x) => x <= low);
        return sizes.some((x) => low <= x && x <= high);
      });
    }

    // Numbers by value, with "-" for none behind them all; words as one reads them.
    function compare(a, b) {
      const numeric = headings[order.column].classList.contains("n");
      const [x, y] = numeric ? [parseFloat(a), parseFloat(b)] : [NaN, NaN];
      if (!isNaN(x) && !isNaN(y)) return x - y;
      if (isNaN(x) !== isNaN(y)) return (isNaN(x) ? 1 : -1) * order.sign;
      return a.localeCompare(b, "en", { numeric: true });
    }

    function draw() {
      const seen = items.slice(0, shown);
      body.replaceChildren(...seen.map(elementOf));
      const layers = items.reduce((sum, item) => sum + item.names.length, 0);
      const number = (x) => x.toLocaleString("en");
      const words = `${number(layers)} of ${number(total)} layers in ${number(items.length)} rows`;
      const hidden = items.length - seen.length;
      form.querySelector("[role=status]").textContent = hidden
        ? `${words}, ${number(seen.length)} of which are shown`
        : words;
      more.hidden = !hidden;
      more.textContent = `Show ${number(Math.min(hidden, AT_A_TIME))} more rows`;
    }
  }
})();
