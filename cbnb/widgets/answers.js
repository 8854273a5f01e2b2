// The reader of actions: a list of answers and episodes with filters and a search, and what the models did beside each other. It stands behind
// strip.js in one module and uses what is defined there. All text is set as textContent, so nothing of an answer is ever read as markup.

const ROW = 46;           // pixels of a row of the list; answers.css has the same
const NEAR = 10;          // rows beyond the window that are in the page
const LONG = 1200;        // characters of a message of the context that is folded
const FIELDS = ["source", "kind", "suite", "attack", "asked"];
const CHANGES = { changed: "another outcome than before", reworded: "the same outcome in other words" };

const many = (n) => n.toLocaleString("en");
const plural = (n, word) => `${many(n)} ${word}${n === 1 ? "" : "s"}`;
const slug = (word) => word.replace(/[^a-z]+/g, "-");

// Ranges of `text` where `query` (lower case) stands: [from, to] each.
function rangesOf(text, query) {
  const found = [], low = text.toLowerCase();
  if (query && low.length === text.length) for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, at + query.length)) found.push([at, at + query.length]);
  return found;
}

// A text as nodes: injected stretches and hits of the search are marked, the stretch that another text does not share is underlined.
function markedText(text, marks, query, other = null) {
  const layers = { injected: marks, hit: rangesOf(text, query), differs: other === null ? [] : [unshared(text, other)] };
  const cuts = new Set([0, text.length]);
  for (const ranges of Object.values(layers)) for (const range of ranges) for (const at of range) cuts.add(at);
  const edges = [...cuts].sort((a, b) => a - b), made = document.createDocumentFragment();
  const inside = (ranges, at) => ranges.some(([from, to]) => from <= at && at < to);
  let mark = null;
  for (let i = 0; i + 1 < edges.length; i++) {
    const at = edges[i], piece = text.slice(at, edges[i + 1]), names = [];
    if (inside(layers.differs, at)) names.push("an-differs");
    const hit = inside(layers.hit, at), part = hit ? node("mark", { class: ["an-hit", ...names].join(" ") }, piece)
      : names.length ? node("span", { class: names.join(" ") }, piece) : document.createTextNode(piece);
    if (inside(layers.injected, at)) {
      if (!mark) made.append(mark = node("mark", { class: "an-injected" }));
      mark.append(part);
      if (!inside(layers.injected, edges[i + 1])) mark = null;
    } else { mark = null; made.append(part); }
  }
  return made;
}

// [from, to] of `text` that is left when what it shares with `other` at both ends is taken off.
function unshared(text, other) {
  let from = 0, to = text.length, end = other.length;
  while (from < to && from < end && text[from] === other[from]) from++;
  while (to > from && end > from && text[to - 1] === other[end - 1]) { to--; end--; }
  return [from, to];
}

function badge(word, meaning) { return node("span", { class: `an-badge o-${slug(word)}`, title: meaning || null }, word); }

let readers = 0;      // ids of rows are unique in a page that shows several readers

function createAnswers(el, model) {
  const id = `an${++readers}`, data = model.get("data"), { cases, texts, contexts, stages, meanings } = data, last = stages.length - 1;
  const filter = { source: null, kind: null, suite: null, attack: null, asked: null, outcome: null, side: last, move: null };
  let query = "", matches = null, low = null, shown = [], place = -1, drawn = 0, told = 0, timer = 0, asks = 0, hit = -1, hits = [];

  const search = node("input", { type: "search", placeholder: "search ( / )", "aria-label": "search in questions and answers",
    oninput: () => { clearTimeout(timer); timer = setTimeout(runSearch, 100); }, onkeydown: searchKey });
  const count = node("span", { class: "cb-note", role: "status" });
  const chips = node("div", { class: "an-chips", role: "group", "aria-label": "outcome" });
  const side = node("select", { "aria-label": "outcome of", onchange: (e) => { filter.side = Number(e.target.value); refilter(); } },
    ...(stages.length > 1 ? [node("option", { value: -1 }, "any of them")] : []), ...stages.map((name, s) => node("option", { value: s, selected: s === last }, name)));
  const picks = {}, labels = FIELDS.map((field) => {
    const values = [...new Set(cases.map((c) => c[field]))].sort();
    picks[field] = node("select", { "aria-label": field, onchange: (e) => { filter[field] = e.target.value === "any" ? null : values[Number(e.target.value)]; refilter(); } });
    picks[field].values = values;
    return node("label", { hidden: values.length < 2 }, `${field} `, picks[field]);
  });
  const clear = node("button", { type: "button", onclick: () => { reset(); list.focus(); } }, "all");
  const moves = node("div", { class: "an-moves" });
  const movesBox = node("details", { hidden: stages.length < 2 }, node("summary", {}, `${stages[0]} → ${stages[last]}`), moves);
  const bar = node("div", { class: "cb-bar" }, node("label", { hidden: stages.length < 2 }, "outcome ", side), ...labels, search, clear, count);

  const rows = node("div", { class: "an-rows", role: "presentation" });
  const list = node("div", { class: "an-list", role: "listbox", tabindex: 0, "aria-label": "answers and episodes" }, rows);
  const about = node("div", { class: "an-about", role: "region", "aria-label": "the chosen answer", tabindex: 0 });
  const keys = node("div", { class: "cb-key" }, "↑ ↓ answer · / search · n p next and previous hit (without a search: changed answer) · enter " +
    (model.get("live") ? "tokens and masks below · k KL below" : "how to open its tokens") + " · escape all");
  const status = node("div", { class: "an-status", role: "status" });
  const message = node("div", { class: "cb-message", hidden: !data.message }, data.message);
  const root = node("div", { class: "cb-strip cb-answers", "data-lm-suppress-shortcuts": "true" }, message, bar, chips, movesBox,
    node("div", { class: "an-body" }, list, about), keys, status);
  el.append(root);

  // What each case is counted as: its outcomes by stage, whether it changed, and its move from the first outcome to the last.
  const outcomesAt = (c, s) => c.actions[s]?.outcomes ?? [], present = new Set(cases.flatMap((c) => stages.flatMap((_, s) => outcomesAt(c, s))));
  const ordered = [...data.outcomes.filter((word) => present.has(word)), ...[...present].filter((word) => !data.outcomes.includes(word)).sort(),
    ...Object.keys(CHANGES).filter((word) => cases.some((c) => c.change === word))];
  const moveOf = cases.map((c) => [0, last].map((s) => outcomesAt(c, s).join(", ") || "–").join("\n"));
  const wordsOf = (c) => filter.side < 0 ? [...new Set(stages.flatMap((_, s) => outcomesAt(c, s)))] : outcomesAt(c, filter.side);
  const holds = (c, word) => word in CHANGES ? c.change === word : wordsOf(c).includes(word);

  // The filters that keep case `k` out, at most two of them.
  function against(k) {
    const c = cases[k], found = [];
    if (matches && !matches[k]) found.push("search");
    for (const field of FIELDS) if (filter[field] !== null && c[field] !== filter[field]) { found.push(field); if (found.length > 1) return found; }
    if (filter.outcome && !holds(c, filter.outcome)) found.push("outcome");
    if (filter.move && moveOf[k] !== filter.move) found.push("move");
    return found;
  }

  function reset() {
    for (const field of FIELDS) filter[field] = null;
    Object.assign(filter, { outcome: null, move: null, side: last });
    side.value = String(last);
    search.value = ""; query = ""; matches = null;
    refilter();
  }

  // Every text once, in lower case; a case matches where one of its texts or its words does.
  function runSearch() {
    query = search.value.toLowerCase();
    if (!query) matches = null;
    else {
      low ??= texts.map((text) => text.toLowerCase());
      const has = Uint8Array.from(low, (text) => text.includes(query));
      const parts = (list) => list.some((part) => has[part.text]), inContext = contexts.map(parts);
      matches = Uint8Array.from(cases, (c) => c.id.toLowerCase().includes(query) || c.context >= 0 && inContext[c.context] || c.wanted.some(([, t]) => has[t]) ||
        c.actions.some((a) => a && (has[a.raw] || parts(a.parts) || a.facts.some(([, text]) => text.toLowerCase().includes(query)))));
    }
    refilter();
  }

  // What is left, and what of each choice is left by all other filters: one look at every case.
  function refilter() {
    const chosen = shown[place], words = new Map(ordered.map((word) => [word, 0])), moved = new Map(), fields = Object.fromEntries(FIELDS.map((field) => [field, new Map()]));
    const add = (map, key) => map.set(key, (map.get(key) ?? 0) + 1);
    shown = [];
    for (let k = 0; k < cases.length; k++) {
      const c = cases[k], found = against(k), counts = (name) => !found.length || found.length === 1 && found[0] === name;
      if (!found.length) shown.push(k);
      if (found.length > 1) continue;
      if (counts("outcome")) { for (const word of wordsOf(c)) add(words, word); if (c.change) add(words, c.change); }
      if (counts("move")) add(moved, moveOf[k]);
      for (const field of FIELDS) if (counts(field)) add(fields[field], c[field]);
    }
    rows.style.height = `${shown.length * ROW}px`;
    count.textContent = shown.length === cases.length ? plural(cases.length, "case") : `${many(shown.length)} of ${plural(cases.length, "case")}`;
    place = -1;
    controls(words, moved, fields);
    const at = chosen === undefined ? -1 : shown.indexOf(chosen);
    choose(at >= 0 ? at : shown.length ? 0 : -1);
  }

  function controls(words, moved, fields) {
    chips.replaceChildren(...[...words].map(([word, n]) => node("button", {
      type: "button", class: `an-chip o-${slug(word)}`, "aria-pressed": String(filter.outcome === word), "data-word": word, title: meanings[word] ?? CHANGES[word] ?? null,
      onclick: () => { filter.outcome = filter.outcome === word ? null : word; refilter(); refocus("data-word", word); } }, `${word} `, node("b", {}, many(n)))));
    for (const field of FIELDS) {
      const { values } = picks[field], chosen = filter[field] === null ? "any" : String(values.indexOf(filter[field]));
      picks[field].replaceChildren(node("option", { value: "any" }, "any"), ...values.map((value, i) => node("option", { value: i }, `${value || "none"} (${many(fields[field].get(value) ?? 0)})`)));
      picks[field].value = chosen;
    }
    if (stages.length > 1) table(moved);
  }

  function refocus(name, value) { [...root.querySelectorAll(`[${name}]`)].find((found) => found.getAttribute(name) === value)?.focus(); }

  function table(moved) {
    const pairs = [...moved.keys()].map((key) => key.split("\n")), order = (i) => [...new Set(pairs.map((p) => p[i]))].sort();
    const cell = (from, to) => {
      const key = `${from}\n${to}`, n = moved.get(key), on = filter.move === key;
      if (!n) return node("td", {}, "0");
      const act = () => { filter.move = on ? null : key; refilter(); refocus("data-move", key); };
      return node("td", {}, node("button", { type: "button", "aria-pressed": String(on), "data-move": key, onclick: act, title: `${from} → ${to}` }, many(n)));
    };
    const tos = order(1);
    moves.replaceChildren(node("table", {}, node("thead", {}, node("tr", {}, node("th", { scope: "col" }, `${stages[0]} ↓ ${stages[last]} →`), ...tos.map((to) => node("th", { scope: "col" }, to)))),
      node("tbody", {}, ...order(0).map((from) => node("tr", {}, node("th", { scope: "row" }, from), ...tos.map((to) => cell(from, to)))))));
  }

  // The list: only the rows near the window are in the page.
  function row(at) {
    const c = cases[shown[at]], a = c.actions[last] ?? c.actions.find(Boolean);
    const words = stages.length > 1 ? [0, last] : [0], heads = words.flatMap((s, i) => [...(i ? [node("span", { class: "an-arrow" }, "→")] : []),
      ...(c.actions[s] ? outcomesAt(c, s).map((word) => badge(word)) : [node("span", { class: "cb-note" }, "–")])]);
    const about = [c.asked === "prefilled" ? "prefilled" : "", c.suite, c.kind, c.attack].filter(Boolean).join(" · ");
    const made = node("div", { id: `${id}-${at}`, class: `an-row${at === place ? " sel" : ""}`, role: "option", "aria-selected": String(at === place), "aria-setsize": shown.length,
      "aria-posinset": at + 1 }, node("div", { class: "an-line" }, node("span", { class: "an-name" }, c.id), node("span", { class: "cb-note" }, about)),
    node("div", { class: "an-line" }, node("span", { class: "an-outcomes" }, ...heads), node("span", { class: "an-said" }, a ? texts[a.raw].slice(0, 160) : "")));
    made.style.top = `${at * ROW}px`;
    made.cbPlace = at;
    return made;
  }
  function drawRows() {
    drawn = 0;
    if (!shown.length) {
      rows.style.height = `${ROW}px`;
      return rows.replaceChildren(node("div", { class: "an-row an-none", role: "option", "aria-selected": "false", "aria-disabled": "true" }, "Nothing is left; escape shows all."));
    }
    const from = Math.max(0, Math.floor(list.scrollTop / ROW) - NEAR), to = Math.min(shown.length, Math.ceil((list.scrollTop + (list.clientHeight || 600)) / ROW) + NEAR);
    const numbers = new Set(Array.from({ length: Math.max(0, to - from) }, (_, i) => from + i));
    if (place >= 0) numbers.add(place);      // the focused row stays in the page
    rows.replaceChildren(...[...numbers].sort((a, b) => a - b).map(row));
  }
  function draw() { if (!drawn) drawn = requestAnimationFrame(drawRows); }
  list.addEventListener("scroll", draw);
  list.addEventListener("click", (event) => { const found = event.target.closest(".an-row"); if (found?.cbPlace !== undefined) choose(found.cbPlace); });

  function choose(at, end = false) {
    place = at >= 0 && at < shown.length ? at : -1;
    hit = -1;
    if (place >= 0) {
      const top = place * ROW;
      if (top < list.scrollTop) list.scrollTop = top;
      else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
      list.setAttribute("aria-activedescendant", `${id}-${place}`);
      if (model.get("place") !== shown[place]) { model.set("place", shown[place]); model.save_changes(); }
    } else list.removeAttribute("aria-activedescendant");
    drawRows();
    if (!told) told = requestAnimationFrame(() => { told = 0; describe(end); });
  }

  // The chosen case: what was asked and, beside each other, what was done.
  function describe(end) {
    about.replaceChildren();
    about.scrollTop = 0;
    hits = [];
    if (place < 0) return about.append(node("p", { class: "cb-note" }, "No answer is chosen."));
    const c = cases[shown[place]];
    const facts = [["source", c.source], ["suite", c.suite], ["kind", c.kind], ["attack", c.attack], ["label", c.label], ["asked", c.asked], ["change", c.change]].filter(([, text]) => text);
    about.append(node("div", { class: "an-head" }, node("h2", {}, c.id), ...facts.map(([name, text]) => node("span", { class: "an-fact" }, node("span", { class: "cb-note" }, `${name} `), text))));
    if (c.wanted.length) about.append(node("div", { class: "an-wanted" }, ...c.wanted.flatMap(([name, t]) => [node("span", { class: "cb-note" }, name), node("span", { class: "an-text" }, markedText(texts[t], [], query))])));
    const acts = node("div", { class: "an-sides" }, ...stages.map((_, s) => actionOf(c, s)));
    const asked = c.context < 0 ? node("p", { class: "cb-note" }, "What was asked is not here: the transcript was not found when this view was made.")
      : node("section", { class: "an-context" }, node("h3", {}, c.source === "episode" ? "common to all" : "what was asked"), ...contexts[c.context].map((part) => partOf(part, true)));
    about.append(...(c.source === "episode" ? [asked, acts] : [acts, asked]), opening(c));
    hits = [...about.querySelectorAll(".an-hit")];
    if (end && hits.length) showHit(hits.length - 1); else if (query && hits.length && end !== null) hit = -1;
  }

  function partOf(part, fold, other = null) {
    const text = texts[part.text], body = node("div", { class: "an-text" }, markedText(text, part.marks, query, other));
    const who = node("span", { class: "an-who" }, part.who), name = `an-part r-${part.role}${part.kind ? ` k-${part.kind}` : ""}`;
    const folded = fold && !part.marks.length && (text.length > LONG || part.role === "system" && text.length > 160) && !(query && text.toLowerCase().includes(query));
    if (folded) return node("details", { class: name }, node("summary", {}, who, node("span", { class: "cb-note" }, ` ${plural(text.length, "character")}: ${text.slice(0, 90)}…`)), body);
    return node("div", { class: name }, who, body);
  }

  function actionOf(c, s) {
    const a = c.actions[s], head = node("h3", {}, stages[s]);
    if (!a) return node("section", { class: "an-side" }, head, node("p", { class: "cb-note" }, "nothing is kept of it"));
    const other = stages.length === 2 ? c.actions[1 - s] : null, open = (what, words, title) => node("button", { type: "button", title, onclick: () => ask(what, s) }, words);
    const tools = model.get("live") ? [node("div", { class: "cb-bar an-open" }, open("masks", "tokens and masks", "opens the mask explorer at this action, below (enter)"),
      ...(data.measures ? [open("kl", "KL and hidden states", "loads the model and opens the KL explorer at this action, below (k)")] : []))] : [];
    const raw = texts[a.raw], [only] = a.parts;
    // what could not be read as anything else stands once, as it was written
    const parts = c.source === "answer" && a.parts.length === 1 && only.kind === "text" && raw.includes(texts[only.text].trim()) ? [] : a.parts;
    return node("section", { class: "an-side" }, head, node("div", { class: "an-outcomes" }, ...a.outcomes.map((word) => badge(word, meanings[word]))),
      ...parts.map((part) => partOf(part, c.source === "episode")),
      ...(raw && c.source === "answer" ? [node("div", { class: "an-raw" }, node("span", { class: "an-who" }, "as written"), node("div", { class: "an-text" }, markedText(raw, [], query, other ? texts[other.raw] : null)))] : []),
      node("p", { class: "an-facts" }, ...a.facts.map(([name, text]) => node("span", { class: "an-fact" }, node("span", { class: "cb-note" }, `${name} `), text))), ...tools);
  }

  function opening(c) {
    if (model.get("live") || !data.command) return "";
    return node("details", { class: "an-opening" }, node("summary", {}, "its tokens, masks, KL and hidden states"),
      node("p", {}, "This page has no model. The notebook shows the mask explorer and the KL explorer at this action:"),
      node("pre", { tabindex: 0 }, data.command.replaceAll("{number}", String(c.number))));
  }

  function ask(what, s) {
    status.textContent = what === "kl" ? "The model is loaded; the KL explorer opens below …" : "The mask explorer opens below …";
    model.set("ask", { n: ++asks, number: cases[shown[place]].number, stage: stages[s], what });
    model.save_changes();
  }
  function open(what) {
    if (place < 0) return;
    const c = cases[shown[place]], s = c.actions[last] ? last : c.actions.findIndex(Boolean);
    if (model.get("live")) return what === "masks" || data.measures ? ask(what, s) : null;
    const box = about.querySelector(".an-opening");
    if (box) { box.open = true; box.scrollIntoView({ block: "nearest" }); box.querySelector("summary").focus({ preventScroll: true }); }
  }

  function showHit(i) {
    hits[hit]?.classList.remove("an-now");
    hit = i;
    const found = hits[i];
    found.classList.add("an-now");
    for (let box = found.closest("details"); box && about.contains(box); box = box.parentElement.closest("details")) box.open = true;
    const mine = found.getBoundingClientRect(), around = about.getBoundingClientRect();
    if (mine.top < around.top + 30 || mine.bottom > around.bottom - 10) about.scrollTop += mine.top - around.top - about.clientHeight / 3;
  }
  // n and p: through the hits of the search, from case to case; without a search from one changed case to the next.
  function step(by) {
    if (query) {
      if (hits[hit + by]) return showHit(hit + by);
      const at = place + by;
      if (at < 0 || at >= shown.length) return void (status.textContent = `There is no ${by > 0 ? "further" : "earlier"} hit.`);
      choose(at, by < 0);
      cancelAnimationFrame(told); told = 0;
      describe(by < 0);
      if (by > 0 && hits.length) showHit(0);
      return;
    }
    for (let at = place + by; at >= 0 && at < shown.length; at += by) if (cases[shown[at]].change === "changed") return choose(at);
    status.textContent = `There is no ${by > 0 ? "further" : "earlier"} answer that changed.`;
  }

  function searchKey(event) {
    event.stopPropagation();
    if (event.key === "Enter") { clearTimeout(timer); runSearch(); list.focus(); event.preventDefault(); }
    if (event.key === "Escape") { reset(); list.focus(); event.preventDefault(); }
  }
  root.addEventListener("keydown", (event) => {
    event.stopPropagation();      // JupyterLab would take letters for itself
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
    const letter = event.key.length === 1 ? event.key.toLowerCase() : event.key, page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const moving = { ArrowDown: () => choose(Math.min(shown.length - 1, place + 1)), ArrowUp: () => choose(Math.max(0, place - 1)),
      PageDown: () => choose(Math.min(shown.length - 1, place + page)), PageUp: () => choose(Math.max(0, place - page)), Home: () => choose(0), End: () => choose(shown.length - 1), Enter: () => open("masks") };
    const anywhere = { n: () => step(event.shiftKey ? -1 : 1), p: () => step(-1), k: () => open("kl"), "/": () => { search.focus(); search.select(); }, Escape: () => { reset(); list.focus(); } };
    const act = anywhere[letter] ?? (event.target === list ? moving[letter] : undefined);
    if (act) { status.textContent = ""; event.preventDefault(); act(); }
  });

  const resized = new ResizeObserver(draw);
  resized.observe(list);
  const answered = () => {
    status.textContent = model.get("answer");
    if (asks && status.textContent) status.scrollIntoView({ block: "start" });
  };
  const chose = () => {
    const k = model.get("place");
    if (k === shown[place]) return;
    if (!shown.includes(k)) reset();
    choose(shown.indexOf(k));
  };
  const lose = () => { message.textContent = [data.message, GONE].filter(Boolean).join("\n"); message.hidden = false; };
  model.on("comm_live_update", lose);
  model.on("change:answer", answered);
  model.on("change:place", chose);
  const first = model.get("place");
  refilter();
  choose(Math.max(0, shown.indexOf(first)));
  if (!model.get("live") && window.top === window) list.focus({ preventScroll: true });
  return () => {
    resized.disconnect(); clearTimeout(timer); cancelAnimationFrame(drawn); cancelAnimationFrame(told);
    model.off("change:answer", answered); model.off("change:place", chose); model.off("comm_live_update", lose);
    root.remove();
  };
}

const renderAnswers = guarded(({ model, el }) => createAnswers(el, model));
