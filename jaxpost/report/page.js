"use strict";
// Everything that comes from a model goes into the page as text (textContent), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const short = (x) => (x === null || x === undefined ? "–" : Number.isInteger(x) ? String(x) : String(+x.toPrecision(4)));

  // --- values under the pointer ---------------------------------------------------------------------------------

  function nearest(points, x) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  }

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[Number(svg.dataset.chart)];
    const caption = svg.parentElement.querySelector("figcaption");
    const line = document.createElementNS(svg.namespaceURI, "line");
    line.setAttribute("class", "at");
    line.setAttribute("y1", chart.top);
    line.setAttribute("y2", chart.bottom);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.width;
      const wanted = ((at - chart.left) / (chart.right - chart.left)) * chart.last;
      const found = chart.series.map(([label, points]) => [label, nearest(points, wanted)]);
      const step = found.reduce((a, [, p]) => (Math.abs(p[0] - wanted) < Math.abs(a - wanted) ? p[0] : a), found[0][1][0]);
      const x = chart.left + (step / chart.last) * (chart.right - chart.left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      if (!line.parentNode) svg.append(line);
      const value = (v) => (chart.percent ? `${(100 * v).toFixed(1)}%` : short(v));
      const here = found.filter(([, p]) => p[0] === step);
      caption.textContent = `step ${step}: ` + here.map(([label, p]) => `${label} ${value(p[1])}`).join(" · ");
    });
    svg.addEventListener("pointerleave", () => {
      line.remove();
      caption.textContent = "";
    });
  }

  // --- a table that filters, sorts and pages ----------------------------------------------------------------------

  const SIZE = 20;

  function browser(root, columns, rows, filters) {
    let page = 0, sorted = null, down = false, found = rows;
    const controls = make("div", "filters");
    for (const filter of filters) {
      const label = make("label", "", filter.label);
      const input = make(filter.options ? "select" : "input");
      if (filter.options) {
        for (const [value, text] of [["", "all"], ...filter.options]) {
          const option = make("option", "", text);
          option.value = value;
          input.append(option);
        }
      } else {
        input.type = filter.type;
        if (filter.type === "number") input.step = "any";
      }
      input.addEventListener("input", () => { page = 0; filter.value = input.value; update(); });
      label.append(input);
      controls.append(label);
    }
    const pager = make("div", "pager");
    const back = make("button", "", "‹ back"), next = make("button", "", "next ›"), where = make("span");
    back.addEventListener("click", () => { page -= 1; draw(); });
    next.addEventListener("click", () => { page += 1; draw(); });
    pager.append(back, where, next);
    const table = make("table"), head = make("thead"), body = make("tbody"), titles = make("tr");
    columns.forEach((column) => {
      const cell = make("th", "", column.title);
      if (column.sort) {
        cell.setAttribute("role", "button");
        cell.tabIndex = 0;
        const turn = () => { down = sorted === column ? !down : true; sorted = column; page = 0; update(); };
        cell.addEventListener("click", turn);
        cell.addEventListener("keydown", (event) => { if (event.key === "Enter") turn(); });
      }
      column.head = cell;
      titles.append(cell);
    });
    head.append(titles);
    table.append(head, body);
    const scroll = make("div", "scroll");
    scroll.append(table);
    root.append(controls, pager, scroll);

    function update() {
      found = rows.filter((row) => filters.every((f) => !f.value || f.keep(row, f.value)));
      if (sorted) {
        const key = sorted.sort, sign = down ? -1 : 1;
        found = [...found].sort((a, b) => {
          const x = key(a), y = key(b);
          if (x === null || y === null) return (x === null) - (y === null);
          return x < y ? -sign : x > y ? sign : 0;
        });
      }
      draw();
    }

    function draw() {
      const pages = Math.max(1, Math.ceil(found.length / SIZE));
      page = Math.min(Math.max(page, 0), pages - 1);
      const shown = found.slice(page * SIZE, (page + 1) * SIZE);
      where.textContent = found.length ? `${page * SIZE + 1}–${page * SIZE + shown.length} of ${found.length}` : "nothing";
      back.disabled = page === 0;
      next.disabled = page === pages - 1;
      for (const column of columns) column.head.textContent = column.title + (column === sorted ? (down ? " ↓" : " ↑") : "");
      body.replaceChildren(...shown.map((row) => {
        const line = make("tr");
        for (const column of columns) {
          const cell = make("td", column.wide ? "wide" : "n");
          cell.dataset.title = column.title;
          cell.append(column.cell(row));
          line.append(cell);
        }
        return line;
      }));
    }

    update();
  }

  // The search's words, marked. Built of text nodes, as everything here.
  function marked(text, word) {
    const box = make("div", "text");
    if (!word) { box.textContent = text; return box; }
    const lower = text.toLowerCase(), wanted = word.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0 && lower.length === text.length; at = lower.indexOf(wanted, from)) {
      box.append(text.slice(from, at), make("mark", "", text.slice(at, at + word.length)));
      from = at + word.length;
    }
    box.append(text.slice(from));
    return box;
  }

  const texts = data.texts;
  const options = (values) => [...new Set(values)].map((v) => [String(v), String(v)]);
  const numbers = (values) => [...new Set(values)].sort((a, b) => a - b).map((v) => [String(v), String(v)]);

  function rewardCell(row) {
    const box = make("div", "", short(row.reward));
    row.rewards.forEach((value, i) => {
      if (data.columns[i] !== undefined && value !== null) box.append(make("div", "parts", `${data.columns[i]} ${short(value)}`));
    });
    return box;
  }

  function samples(root) {
    const rows = data.samples.map(([step, source, example, sample, prompt, text, answer, rewards, reward, advantage, finish, tokens]) => ({
      step, source: data.sources[source], example: texts[example], sample, prompt: texts[prompt], text: texts[text],
      answer: texts[answer], rewards, reward, advantage, finish: texts[finish], tokens,
    }));
    const has = (name) => rows.some((row) => row[name] !== null && row[name] !== "");
    const search = {
      label: "text", type: "search",
      keep: (row, word) => [row.prompt, row.text, row.answer, row.example].some((t) => t.toLowerCase().includes(word.toLowerCase())),
    };
    const plain = (name) => ({ title: name, sort: (row) => row[name], cell: (row) => make("span", "", row[name] === null ? "–" : typeof row[name] === "number" ? short(row[name]) : row[name]) });
    const columns = [plain("step"), plain("source")];
    if (has("reward")) columns.push({ title: "reward", sort: (row) => row.reward, cell: rewardCell });
    for (const name of ["advantage", "finish", "tokens"]) if (has(name)) columns.push(plain(name));
    columns.push({ title: "prompt", wide: true, cell: (row) => marked(row.prompt, search.value) });
    if (has("answer")) columns.push({ title: "gold", wide: true, cell: (row) => marked(row.answer, search.value) });
    columns.push({ title: "answer", wide: true, sort: (row) => row.text.length, cell: (row) => marked(row.text, search.value) });
    const filters = [
      { label: "step", options: numbers(rows.map((r) => r.step)), keep: (row, v) => String(row.step) === v },
      { label: "source", options: options(rows.map((r) => r.source)), keep: (row, v) => row.source === v },
    ];
    if (has("finish")) filters.push({ label: "finish", options: options(rows.map((r) => r.finish)), keep: (row, v) => row.finish === v });
    if (has("reward")) {
      filters.push({ label: "reward from", type: "number", keep: (row, v) => row.reward !== null && row.reward >= Number(v) });
      filters.push({ label: "reward to", type: "number", keep: (row, v) => row.reward !== null && row.reward <= Number(v) });
    }
    filters.push(search);
    browser(root, columns, rows, filters);
  }

  function changes(root) {
    const rows = data.changes.map(([example, what, prompt, answer, before, after]) => ({
      example: texts[example], what: texts[what], prompt: texts[prompt], answer: texts[answer], before: texts[before], after: texts[after],
    }));
    const search = { label: "text", type: "search", keep: (row, word) => Object.values(row).some((t) => t.toLowerCase().includes(word.toLowerCase())) };
    const text = (title, name) => ({ title, wide: true, cell: (row) => marked(row[name], search.value) });
    browser(
      root,
      [text("what changed", "what"), text("prompt", "prompt"), text("gold", "answer"), text("before", "before"), text("after", "after")],
      rows,
      [{ label: "what changed", options: options(rows.map((r) => r.what)), keep: (row, v) => row.what === v }, search],
    );
  }

  for (const [id, draw] of [["samples", samples], ["changes", changes]]) {
    const root = document.getElementById(id);
    if (root) draw(root);
  }
})();
