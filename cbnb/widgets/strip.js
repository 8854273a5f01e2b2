// The token strip: tokens as text, with roles, masks, differences and heat. No build step: this file is put together with others
// into one module (cbnb.widgets.views). All text is set as textContent, so nothing of a transcript is ever read as markup.

const LETTERS = { system: "S", user: "U", assistant: "A", tool: "T" };
const EDGES = { header: "e1", template: "e1", padding: "e1", reasoning: "e2", "tool call": "e3", "tool name": "e3", "tool arguments": "e3" };
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const KINDS = ["", " sp", " part"];      // text, added token, part of a character
const BLOCK = 256;      // tokens of a block: only the blocks near the window are in the page
let viewWidth = 800;    // of the strip shown last: to ask a new one would lay out the whole page before it is built
let strips = 0;         // ids of tokens are unique in a page that shows several strips

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);      // strings become text nodes
  return made;
}

// A copy, since a view into a message may begin at an odd byte.
function array(Kind, view) {
  if (!view) return new Kind(0);
  return new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function figure(x, digits = 3) {
  if (x === null || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  return size >= 1e-3 && size < 1e6 ? String(+x.toPrecision(digits)) : x.toExponential(digits - 1);
}

// A render function that throws would leave a blank cell: its message is shown in its place.
function guarded(render) {
  return ({ model, el }) => {
    const fail = (error) => {
      el.replaceChildren(node("div", { class: "cb-strip" }, node("div", { class: "cb-message", role: "alert" },
        `This view cannot be shown: ${error?.message ?? error}`)));
    };
    try { return render({ model, el }); } catch (error) { fail(error); }
  };
}

// `plain` is the text itself, `texts` what it is written out as, `soft` the same with blanks as blanks.
function readTokens(model) {
  const given = model.get("tokens"), parts = given.parts || {};
  const signed = (blank) => given.texts.map((text, k) => parts[k] ?? (text.replaceAll(" ", blank).replaceAll("\t", "⇥").replaceAll("\n", "↵\n") || "∅"));
  const tokens = {
    plain: given.texts, texts: signed("·"), soft: signed("\u00a0"), injection: array(Uint8Array, given.injection), note: given.injection_note || "", ids: array(Uint32Array, given.ids), kinds: array(Uint8Array, given.kinds), numbers: array(Int32Array, given.token_ids),
    owners: array(Int32Array, given.messages), roles: given.roles, segments: array(Uint8Array, given.segments), names: given.segment_names,
  };
  tokens.n = tokens.ids.length;
  tokens.sizes = Uint16Array.from(tokens.texts, (text) => Math.min(65535, text.length));
  tokens.breaks = Uint8Array.from(tokens.texts, (text) => text.includes("\n"));
  return tokens;
}

function readMasks(model) {
  return (model.get("masks") || []).map((m) => ({ name: m.name, note: m.note || "", values: array(Uint8Array, m.values),
    codes: array(Uint32Array, m.codes), sentences: m.sentences || [] }));
}

// Values in ten classes: by `edges`, nine rising values that classes begin at, or by logarithm over at most five decades below the largest.
function readHeats(model) {
  return (model.get("heats") || []).map((h) => {
    const values = array(Float32Array, h.values);
    let low = Infinity, high = 0;
    for (const v of values) if (v > 0 && v < Infinity) { low = Math.min(low, v); high = Math.max(high, v); }
    low = high > 0 ? Math.max(low, high / 1e5) : 1;
    const span = Math.log(high / low) || 1;
    const relative = (v) => v <= low ? 0 : v >= high ? 9 : Math.min(9, Math.floor(10 * Math.log(v / low) / span));
    const level = (v) => Number.isNaN(v) ? -1 : h.edges ? h.edges.filter((edge) => v >= edge).length : relative(v);
    return { name: h.name, unit: h.unit || "", edges: h.edges, none: h.none || "no value", values, low, high, levels: Int8Array.from(values, level) };
  });
}

// Blocks end with a message, else after a line end, so that they do not show; [start, end) each.
function cutBlocks(tokens) {
  const blocks = [];
  for (let start = 0; start < tokens.n;) {
    const owner = tokens.owners[start];
    let end = start, line = -1;
    while (end < tokens.n && tokens.owners[end] === owner && end - start < BLOCK) if (tokens.breaks[tokens.ids[end++]]) line = end;
    const cut = end - start === BLOCK && end < tokens.n && tokens.owners[end] === owner;
    if (cut && line - start > BLOCK / 2) end = line;
    blocks.push({ start, end, first: start === 0 || tokens.owners[start - 1] !== owner, filled: false });
    start = end;
  }
  return blocks;
}

// [first, last] tokens of every place where `query` stands in the text, across tokens.
function findText(tokens, query) {
  const wanted = query.toLowerCase();
  if (!wanted) return [];
  const texts = tokens.plain.map((t) => t.toLowerCase()), starts = new Uint32Array(tokens.n + 1), parts = new Array(tokens.n);
  for (let i = 0; i < tokens.n; i++) { parts[i] = texts[tokens.ids[i]]; starts[i + 1] = starts[i] + parts[i].length; }
  const all = parts.join(""), hits = [];
  const token = (at) => {
    let low = 0, high = tokens.n - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (starts[mid] <= at) low = mid; else high = mid - 1; }
    return low;
  };
  for (let at = all.indexOf(wanted); at >= 0 && hits.length < 10000; at = all.indexOf(wanted, at + wanted.length)) {
    let last = token(at + wanted.length - 1);
    while (last + 1 < tokens.n && !parts[last + 1]) last++;      // the other parts of its last character
    hits.push([token(at), last]);
  }
  return hits;
}

// A number that was kept in this browser under `name`, or null: a sandboxed frame and a strict browser refuse to keep anything.
function recall(name) {
  try { return Number(localStorage.getItem(name)) || null; } catch { return null; }
}

function keep(name, value) {
  try { localStorage.setItem(name, value); } catch { /* then it is not kept */ }
}

const GONE = "The kernel that made this view was restarted or has ended. What is shown can still be read; to choose anew, run the cell again.";

// Creates a strip in `el` from `model`; returns a function that takes it down.
function createStrip(el, model) {
  const id = `cb${++strips}`;
  let tokens, masks, heats, blocks, hits = [], hit = new Set(), shown = -1, timer = 0, mapped = 0, base = null;
  let waiting = false;      // to scroll to the chosen token, until the strip is in the page
  let moved = false;      // whether the reader has scrolled or chosen, and the strip may no longer scroll by itself
  const memory = el.closest(".cb-kl") ? "cbnb-kl-height" : "cbnb-strip-height";
  let tall = "";      // the height that was set here; another one was dragged
  let gone = false;      // whether the kernel is
  let blanks = false;      // whether blanks are written out
  let ahead = 0;      // 1 where the position that predicts a token is marked in its place

  const view = node("div", { class: "cb-view", role: "listbox", tabindex: 0 });
  const map = node("canvas", { class: "cb-map", "aria-hidden": "true" });
  const chosen = node("div", { role: "status", "aria-live": "polite" }), hover = node("div", { class: "cb-hover", "aria-hidden": "true" });
  const about = node("div", { class: "cb-about" }, chosen, hover);
  const key = node("div", { class: "cb-key" }), message = node("div", { class: "cb-message", role: "alert", hidden: true });
  const select = (name, trait) => node("select", { "aria-label": name, onchange: (e) => { model.set(trait, e.target.value); model.save_changes(); } });
  const mode = select("what is shown", "view"), first = select("mask A", "a"), second = select("mask B", "b"), heat = select("heat", "heat");
  const shift = node("input", { type: "checkbox", onchange: (e) => { model.set("predicting", e.target.checked); model.save_changes(); } });
  const spell = node("input", { type: "checkbox", onchange: (e) => { blanks = e.target.checked; respell(); } });
  const search = node("input", { type: "search", placeholder: "search ( / )", "aria-label": "search in the text",
    oninput: () => { clearTimeout(timer); timer = setTimeout(runSearch, 120); }, onkeydown: searchKey });
  const count = node("span", { class: "cb-note", role: "status" });
  const button = (text, title, act) => node("button", { type: "button", title, onclick: act }, text);
  const labels = { a: node("label", {}, "A ", first), b: node("label", {}, "B ", second), heat: node("label", {}, "heat ", heat),
    spell: node("label", { title: "write blanks as ·" }, spell, " visible blanks"),
    shift: node("label", { title: "mark the position that predicts each token, one to the left" }, shift, " predicting position") };
  const boundary = button("▸ edge", "next boundary of the mask (b)", () => next(isEdge, 1));
  const differing = button("▸ difference", "next difference between A and B (d)", () => next(isDifference, 1));
  const bar = node("div", { class: "cb-bar" }, node("label", {}, "show ", mode), labels.a, labels.b, labels.heat, labels.shift, labels.spell, boundary, differing, search, count);
  const body = node("div", { class: "cb-body" }, view, map);
  const root = node("div", { class: "cb-strip", "data-lm-suppress-shortcuts": "true" }, message, bar, body, about, key);
  el.append(root);
  if (recall(memory)) {
    view.style.height = `min(${recall(memory)}px, 92vh)`;
    tall = view.style.height;
  }

  const at = (list, name) => list.find((entry) => entry.name === name) || list[0];
  const inside = (mask, i) => mask !== undefined && mask.values[i + ahead] === 1;
  const current = () => ({ view: model.get("view"), a: at(masks, model.get("a")), b: at(masks, model.get("b")), heat: at(heats, model.get("heat")) });
  const isDifference = (i, c) => inside(c.a, i) !== inside(c.b, i);
  const isEdge = (i, c) => i > 0 && inside(c.a, i) !== inside(c.a, i - 1);
  const text = (i) => tokens.texts[tokens.ids[i]], form = (i) => (blanks ? tokens.texts : tokens.soft)[tokens.ids[i]];
  const role = (i) => tokens.owners[i] >= 0 ? tokens.roles[tokens.owners[i]] : "";

  // What a view says of a token, and the sign that says it without colour: [class, sign].
  function state(i, c) {
    if (c.view === "heat" && c.heat) {
      const level = c.heat.levels[i] ?? -1;
      return level < 0 ? [" na", ""] : [` heat h${level}`, String(level)];
    }
    if (c.view === "difference" && c.a && c.b) {
      const a = inside(c.a, i), b = inside(c.b, i);
      return a && b ? [" in", ""] : a ? [" plus", "+"] : b ? [" minus", "\u2212"] : [" out", ""];
    }
    return c.view === "mask" && c.a ? [inside(c.a, i) ? " in" : " out", ""] : ["", ""];
  }

  function paint(span, i, c) {
    const edge = EDGES[tokens.names[tokens.segments[i]]], [of, mark] = state(i, c);
    let name = `cb-t${edge ? ` ${edge}` : ""}${KINDS[tokens.kinds[tokens.ids[i]]]}${of}`;
    if (tokens.injection[i]) name += " inj";
    if (hit.has(i)) name += " hit";
    if (i === shown) name += " sel";
    if (span.className !== name) span.className = name;
    // a sign stands above the first token of its run, and anew in each message
    const sign = mark && (i === 0 || tokens.owners[i - 1] !== tokens.owners[i] || state(i - 1, c)[1] !== mark) ? mark : "";
    if (span.cbSign !== sign) {
      span.cbSign = sign;
      if (sign) span.setAttribute("data-sign", sign); else span.removeAttribute("data-sign");
    }
    if (i === shown) span.setAttribute("aria-selected", "true"); else if (span.cbChosen) span.removeAttribute("aria-selected");
    span.cbChosen = i === shown;
  }

  function fill(block) {
    if (block.filled) return;
    const line = document.createDocumentFragment(), c = current();
    block.spans = [];
    for (let i = block.start; i < block.end; i++) {
      const span = document.createElement("span"), k = tokens.ids[i];
      span.id = `${id}-${i}`;
      span.setAttribute("role", "option");
      span.textContent = form(i);
      if (!tokens.plain[k].trim()) span.setAttribute("aria-label", tokens.texts[k].trim());      // a blank says nothing by itself
      paint(span, i, c);
      if (tokens.plain[k][0] === " " || tokens.kinds[k]) line.append(document.createElement("wbr"));
      if (isInjected(i) && !isInjected(i - 1)) line.append(bracket("injected ⟪"));
      line.append(span);
      if (isInjected(i) && !isInjected(i + 1)) line.append(bracket("⟫"));
      block.spans.push(span);
    }
    block.line.append(line);
    block.line.style.minHeight = "";
    block.filled = true;
  }

  const isInjected = (i) => tokens.injection[i] > 0;
  const bracket = (words) => node("span", { class: "cb-bracket", "aria-hidden": "true" }, words);

  // Blanks as blanks, or written out.
  function respell() {
    for (const block of blocks) if (block.filled) block.spans.forEach((span, k) => { if (tokens.plain[tokens.ids[block.start + k]].includes(" ")) span.textContent = form(block.start + k); });
  }

  // What is selected, as the text that it stands for: whole tokens, but of the first and last one what is selected of them.
  function selectedText(selection) {
    const range = selection.getRangeAt(0), parts = blocks.filter((block) => range.intersectsNode(block.line));
    if (!parts.length) return "";
    const of = (block) => block.filled ? block.spans.flatMap((span, k) => range.intersectsNode(span) ? [block.start + k] : []) : [block.start, block.end - 1];
    const held = [parts[0], parts[parts.length - 1]].map(of), words = [];      // an end of the range may lie between two tokens
    const from = held[0][0] ?? parts[0].end, to = held[1].pop() ?? parts[parts.length - 1].start - 1;
    if (from > to) return "";
    const cut = (i, node, offset, otherwise) => {
      const span = document.getElementById(`${id}-${i}`), plain = tokens.plain[tokens.ids[i]];
      return node.nodeType === Node.TEXT_NODE && span?.contains(node) && form(i).length === plain.length ? offset : otherwise(plain.length);
    };
    for (let i = from; i <= to; i++) words.push(tokens.plain[tokens.ids[i]]);
    const begin = cut(from, range.startContainer, range.startOffset, () => 0), end = cut(to, range.endContainer, range.endOffset, (n) => n);
    words[words.length - 1] = words[words.length - 1].slice(0, end);
    words[0] = words[0].slice(begin);
    return words.join("");
  }

  function drain(block, height) {
    block.line.style.minHeight = `${height}px`;
    block.line.replaceChildren();
    block.filled = false;
    block.spans = null;
  }

  const watcher = new IntersectionObserver((entries) => {
    const { anchorNode, focusNode } = getSelection() ?? {}, selected = (block) => [anchorNode, focusNode].some((end) => end && block.line.contains(end));
    const gone = entries.map((entry) => entry.isIntersecting ? null : entry.target.cbBlock)
      .filter((block) => block?.filled && !(shown >= block.start && shown < block.end) && !selected(block));      // they stay in the page
    const heights = gone.map((block) => block.line.offsetHeight);      // all read before anything is written: one layout, not one a block
    gone.forEach((block, k) => drain(block, heights[k]));
    for (const entry of entries) if (entry.isIntersecting) fill(entry.target.cbBlock);
    frame();
  }, { root: view, rootMargin: "400px 0px" });

  function build() {
    watcher.disconnect();
    view.replaceChildren();
    tokens = readTokens(model);
    blocks = cutBlocks(tokens);
    for (const block of blocks) {
      const owner = tokens.owners[block.start], who = role(block.start), letter = LETTERS[who] || (who ? who[0].toUpperCase() : "");
      block.line = node("div", { class: "cb-line", role: "presentation" });
      const label = node("span", { class: "cb-who", "aria-hidden": "true" });
      if (block.first && owner >= 0) label.append(node("b", {}, letter), ` ${owner}`);
      block.div = node("div", { class: `cb-block${block.first ? " first" : ""}`, role: "presentation" }, label, block.line);
      if (LETTERS[who]) block.div.classList.add(`r-${who}`);
      block.div.cbBlock = block;
      view.append(block.div);
      watcher.observe(block.div);
    }
    estimate();
    // what is seen at once is filled at once; the rest when it comes near
    for (let i = 0, seen = 0; i < blocks.length && seen < 450; i++) { fill(blocks[i]); seen += blocks[i].height; }
    view.setAttribute("aria-label", `${tokens.n} token${tokens.n === 1 ? "" : "s"}${model.get("title") ? ` of ${model.get("title")}` : ""}`);
  }

  // How high each block will be; of those that are not filled it is the height.
  function estimate() {
    const perLine = Math.max(20, Math.floor(viewWidth / 9));
    for (const block of blocks) {
      let lines = 1, width = 0;
      for (let i = block.start; i < block.end; i++) {
        const k = tokens.ids[i];
        width += tokens.sizes[k];
        if (tokens.breaks[k] || width > perLine) { lines++; width = 0; }
      }
      block.height = lines * 27;
      if (!block.filled) block.line.style.minHeight = `${block.height}px`;
    }
  }

  function options(list, into, value) {
    into.replaceChildren(...list.map((name) => node("option", { value: name, selected: name === value }, name)));
  }

  function read() {
    masks = readMasks(model);
    heats = readHeats(model);
    ahead = model.get("predicting") ? 1 : 0;
  }

  function choices() {
    const names = masks.map((m) => m.name);
    const modes = [...(masks.length ? ["mask"] : []), ...(masks.length > 1 ? ["difference"] : []), ...(heats.length ? ["heat"] : []), "text"];
    options(modes, mode, model.get("view"));
    options(names, first, at(masks, model.get("a"))?.name);
    options(names, second, at(masks, model.get("b"))?.name);
    options(heats.map((h) => h.name), heat, at(heats, model.get("heat"))?.name);
  }

  function recolour() {
    ahead = model.get("predicting") ? 1 : 0;
    const c = current();
    for (const block of blocks) if (block.filled) block.spans.forEach((span, k) => paint(span, block.start + k, c));
    around(c);
    seek();
  }

  // The token to open at: the first one in mask A, the first difference, the largest value; -1 where there is none.
  function opening(c) {
    if (c.view === "heat") {
      let best = -1, largest = -Infinity;
      c.heat?.values.forEach((v, i) => { if (v > largest) { largest = v; best = i; } });
      return best;
    }
    const test = c.view === "mask" ? (i) => inside(c.a, i) : c.view === "difference" ? (i) => isDifference(i, c) : () => false;
    for (let i = 0; i < tokens.n; i++) if (test(i)) return i;
    return -1;
  }

  // Scrolls to where something is to be seen, until the reader has scrolled or chosen.
  function seek() {
    if (moved || shown >= 0 || !view.clientHeight) return;
    const i = opening(current());
    if (i < 0) return;
    let above = 0;      // what will stand above it is filled now, so that it stays where it is
    for (let k = blocks.indexOf(blockOf(i)); k >= 0 && above < view.clientHeight; k--) { fill(blocks[k]); above += blocks[k].div.offsetHeight; }
    const block = blockOf(i);
    intoView(block.spans[i - block.start]);
    frame();
  }

  // All that stands around the tokens.
  function around(c) {
    const masked = c.view === "mask" || c.view === "difference";
    labels.a.hidden = !masked; labels.b.hidden = c.view !== "difference"; labels.heat.hidden = c.view !== "heat" || heats.length < 2;
    labels.shift.hidden = !masked; boundary.hidden = !masks.length; differing.hidden = masks.length < 2;
    mode.value = c.view; first.value = c.a?.name ?? ""; second.value = c.b?.name ?? ""; heat.value = c.heat?.name ?? "";
    shift.checked = Boolean(model.get("predicting"));
    const text = gone ? GONE : model.get("message");
    message.textContent = text; message.hidden = !text;
    for (const part of [bar, body, about, key]) part.hidden = Boolean(text) && !tokens.n;
    legend(c);
    describe();
    base = null;
    frame();
  }

  function legend(c) {
    const sample = (name, label, mark = "") => node("span", {}, node("span", { class: `cb-t ${name}`, "data-sign": mark || null }, "ab"), ` ${label}`);
    const n = (test) => { let k = 0; for (let i = 0; i < tokens.n; i++) if (test(i)) k++; return k.toLocaleString("en"); };
    const parts = [];
    if (c.view === "mask" && c.a) parts.push(sample("in", `in A: ${n((i) => inside(c.a, i))}`), sample("out", `out: ${n((i) => !inside(c.a, i))}`));
    if (c.view === "difference" && c.a && c.b) {
      parts.push(sample("plus", `only in A: ${n((i) => inside(c.a, i) && !inside(c.b, i))}`, "+"), sample("minus", `only in B: ${n((i) => inside(c.b, i) && !inside(c.a, i))}`, "\u2212"),
        sample("in", `in both: ${n((i) => inside(c.a, i) && inside(c.b, i))}`), sample("out", "in neither"));
    }
    for (const m of c.view === "mask" ? [c.a] : c.view === "difference" ? [c.a, c.b] : []) if (m?.note) parts.push(node("span", {}, `${m.name}: ${m.note}`));
    if (c.view === "heat" && c.heat) {
      const absent = c.heat.levels.includes(-1) ? [sample("na", c.heat.none)] : [];
      if (c.heat.edges) {      // the same colours for the same values everywhere, all of them explained
        const from = [`< ${c.heat.edges[0]}`, ...c.heat.edges.map((edge) => `≥ ${edge}`)];
        parts.push(node("span", {}, `${c.heat.name}, in ${c.heat.unit}:`), node("span", { class: "cb-scale" }, ...from.map((words, k) => sample(`heat h${k}`, words, String(k)))), ...absent);
      } else if (c.heat.high > 0) {
        parts.push(node("span", {}, `${c.heat.name}, ${c.heat.unit}, by logarithm:`), sample("heat h0", `≤ ${figure(c.heat.low)}`, "0"), sample("heat h4", "", "4"),
          sample("heat h9", figure(c.heat.high), "9"), ...absent);
      } else parts.push(node("span", {}, `${c.heat.name}, ${c.heat.unit}: no value above 0`));
    }
    const count = n(isInjected);
    if (count !== "0") parts.push(node("span", {}, bracket("⟪"), node("span", { class: "cb-t inj" }, "ab"), bracket("⟫"), ` injected text: ${count}`));
    if (tokens.note) parts.push(node("b", {}, tokens.note));
    parts.push(node("span", {}, "← → token · ↑ ↓ line · b edge" + (masks.length > 1 ? " · d difference" : "") + " · / search · n next hit · shift: back"));
    key.replaceChildren(...parts);
  }

  function sentences(i, c) {
    const lines = [], what = tokens.names[tokens.segments[i]], owner = tokens.owners[i];
    const place = owner >= 0 ? `message ${owner} (${role(i)})` : "outside of messages";
    const whose = ["", `, partly injected text of message ${owner}`, `, injected text of message ${owner}`][tokens.injection[i] || 0];
    lines.push(`token ${i}  ${text(i).trimEnd() || text(i)}  ${tokens.numbers[i] < 0 ? "" : `id ${tokens.numbers[i]}, `}${what}, ${place}${whose}; ` +
      (i ? `predicted at position ${i - 1}` : "predicted by nothing"));
    for (const [letter, m] of c.view === "difference" ? [["A", c.a], ["B", c.b]] : [["A", c.a]]) {
      if (!m) continue;
      const k = i + ahead;      // the token whose mark stands here
      if (k >= tokens.n) { lines.push(`${letter} ${m.name}: predicts nothing`); continue; }
      const reason = m.sentences[m.codes[k]] || (m.values[k] ? "in" : "out");
      lines.push(`${letter} ${m.name}: ${ahead ? `predicts token ${k} ${text(k).trimEnd() || text(k)}, ` : ""}${reason}`);
    }
    for (const h of heats) lines.push(`${h.name}: ${figure(h.values[i] ?? NaN, 5)} ${h.unit}`);
    return lines.join("\n");
  }

  function describe() {
    const c = current();
    chosen.textContent = shown >= 0 && shown < tokens.n ? sentences(shown, c) : tokens.n ? "Choose a token by click or by arrow keys." : "";
    hover.textContent = "";
  }

  function show(i, scroll = true) {
    const old = shown, c = current();
    shown = i >= 0 && i < tokens.n ? i : -1;
    for (const k of [old, shown]) {
      const block = k >= 0 ? blockOf(k) : null;
      if (block?.filled) paint(block.spans[k - block.start], k, c);
    }
    if (shown < 0) view.removeAttribute("aria-activedescendant");
    else {
      const block = blockOf(shown);
      fill(block);
      view.setAttribute("aria-activedescendant", `${id}-${shown}`);
      waiting = scroll && !view.clientHeight;
      if (scroll) intoView(block.spans[shown - block.start]);
    }
    describe();
    frame();
  }

  // Scrolls the strip alone: scrollIntoView would move the notebook too.
  function intoView(span) {
    const box = span.getBoundingClientRect(), around = view.getBoundingClientRect();
    if (box.top < around.top + 4) view.scrollTop += box.top - around.top - view.clientHeight / 3;
    else if (box.bottom > around.bottom - 4) view.scrollTop += box.bottom - around.bottom + view.clientHeight / 3;
  }

  function blockOf(i) {
    let low = 0, high = blocks.length - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (blocks[mid].start <= i) low = mid; else high = mid - 1; }
    return blocks[low];
  }

  function choose(i) {
    if (i < 0 || i >= tokens.n) return;
    moved = true;
    model.set("selected", i);
    model.save_changes();
    if (shown !== i) show(i);
  }

  function next(test, step) {
    const c = current();
    for (let i = shown < 0 ? (step > 0 ? 0 : tokens.n - 1) : shown + step; i >= 0 && i < tokens.n; i += step) if (test(i, c)) return choose(i);
    chosen.textContent = `There is no ${step > 0 ? "further one" : "earlier one"}.`;
  }

  function runSearch() {
    hits = findText(tokens, search.value);
    hit = new Set(hits.flatMap(([a, b]) => Array.from({ length: b - a + 1 }, (_, k) => a + k)));
    count.textContent = search.value ? `${hits.length.toLocaleString("en")}${hits.length >= 10000 ? "+" : ""} hit${hits.length === 1 ? "" : "s"}` : "";
    recolour();
  }

  function searchKey(event) {
    event.stopPropagation();
    if (event.key === "Enter") { clearTimeout(timer); runSearch(); nextHit(event.shiftKey ? -1 : 1); event.preventDefault(); }
    if (event.key === "Escape") { search.value = ""; runSearch(); view.focus(); }
  }

  function nextHit(step) {
    const ahead = step > 0 ? hits.find(([a]) => a > shown) ?? hits[0] : hits.findLast(([a]) => a < shown) ?? hits[hits.length - 1];
    if (ahead) choose(ahead[0]);
  }

  // The token that stands above or below the chosen one.
  function vertical(step) {
    if (shown < 0) return choose(0);
    const block = blockOf(shown), rect = block.spans[shown - block.start].getClientRects()[0], middle = rect.left + rect.width / 2;
    let best = -1, distance = Infinity, lineTop = null;
    for (let i = shown + step; i >= 0 && i < tokens.n; i += step) {
      const b = blockOf(i);
      fill(b);
      const box = b.spans[i - b.start].getClientRects()[0];
      if (!box || Math.abs(box.top - rect.top) < 8) continue;
      if (lineTop === null) lineTop = box.top;
      if (Math.abs(box.top - lineTop) > 8) break;
      const away = Math.abs(box.left + box.width / 2 - middle);
      if (away < distance) { distance = away; best = i; }
    }
    if (best >= 0) choose(best);
  }

  view.addEventListener("keydown", (event) => {
    event.stopPropagation();      // JupyterLab would take a, b, m, dd for itself
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") {      // all of the strip, not of the page
      getSelection().selectAllChildren(view);
      event.preventDefault();
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const back = event.shiftKey ? -1 : 1;
    const act = {
      ArrowRight: () => choose(shown + 1), ArrowLeft: () => choose(Math.max(0, shown - 1)), ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1),
      Home: () => choose(0), End: () => choose(tokens.n - 1), PageDown: () => choose(Math.min(tokens.n - 1, Math.max(0, shown) + 100)),
      PageUp: () => choose(Math.max(0, shown - 100)), b: () => next(isEdge, back), d: () => next(isDifference, back), n: () => nextHit(back),
      "/": () => search.focus(), Escape: () => { model.set("selected", -1); model.save_changes(); show(-1); },
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act) { event.preventDefault(); act(); }
  });
  const tokenAt = (event) => {
    const found = event.target.closest?.(".cb-t");
    return found?.id.startsWith(`${id}-`) ? Number(found.id.slice(id.length + 1)) : -1;
  };
  view.addEventListener("click", (event) => { const i = tokenAt(event); if (i >= 0) choose(i); });
  view.addEventListener("mouseover", (event) => { const i = tokenAt(event); hover.textContent = i >= 0 && i !== shown ? sentences(i, current()) : ""; });
  view.addEventListener("mouseleave", () => { hover.textContent = ""; });
  view.addEventListener("copy", (event) => {
    const selection = getSelection(), inside = [selection.anchorNode, selection.focusNode].every((end) => view.contains(end));
    const text = inside && selection.rangeCount ? selectedText(selection) : "";
    if (text) { event.clipboardData.setData("text/plain", text); event.preventDefault(); }
  });
  view.addEventListener("scroll", () => frame());
  const touched = (event) => { if (event.key !== "Tab") moved = true; };
  for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) body.addEventListener(kind, touched, { passive: true });

  // The minimap: the whole transcript in one column, what is seen of it framed, the chosen token and search hits at the left edge.
  function frame() { if (!mapped) mapped = requestAnimationFrame(drawMap); }
  function visibleRange() {
    const top = view.scrollTop, bottom = top + view.clientHeight, place = (y) => {
      for (const b of blocks) {
        const start = b.div.offsetTop - view.offsetTop, height = b.div.offsetHeight || 1;
        if (y <= start + height) return b.start + Math.max(0, Math.min(1, (y - start) / height)) * (b.end - b.start);
      }
      return tokens.n;
    };
    return [place(top), place(bottom)];
  }
  // What scrolling does not change is drawn once, into a canvas of its own: it takes a look at every token.
  function drawBase(rows, width) {
    const made = node("canvas", { width, height: rows }), draw = made.getContext("2d"), c = current(), thick = Math.max(1, Math.round(2 * width / 44));
    const rule = { system: "#CC79A7", user: "#56B4E9", assistant: "#009E73", tool: "#E69F00" };
    for (let y = 0; y < rows; y++) {
      const from = Math.floor(y * tokens.n / rows), to = Math.max(from + 1, Math.floor((y + 1) * tokens.n / rows));
      let level = -1, a = 0, b = 0;
      for (let i = from; i < to; i++) {
        if (c.view === "heat" && c.heat) level = Math.max(level, c.heat.levels[i] ?? -1);
        else if (c.view !== "text") { a += inside(c.a, i); b += inside(c.b, i); }
      }
      draw.fillStyle = rule[role(from)] || "#808080";
      draw.fillRect(width * 0.2, y, width * 0.12, 1);
      let colour = null, wide = 0.46;
      if (level >= 0) { colour = CIVIDIS[level]; wide = 0.1 + 0.04 * level; }
      else if (c.view === "difference" && a !== b) { colour = a > b ? "#009E73" : "#D55E00"; wide = a > b ? 0.46 : 0.23; }
      else if (a) { colour = "#0072B2"; wide = 0.46 * a / (to - from); }
      if (colour) { draw.fillStyle = colour; draw.fillRect(width * 0.36, y, width * wide, 1); }
    }
    draw.fillStyle = getComputedStyle(root).getPropertyValue("--cb-injected-map");
    for (const [from, to] of injections()) {      // a bracket at the right edge
      const top = Math.floor(from * rows / tokens.n), bottom = Math.max(top + 4 * thick, Math.ceil(to * rows / tokens.n));
      draw.fillRect(width - 1.5 * thick, top, 1.5 * thick, bottom - top);
      for (const y of [top, bottom - thick]) draw.fillRect(width * 0.84, y, width * 0.16, thick);
    }
    return made;
  }
  // [first token, token after the last] of each stretch of injected text.
  function injections() {
    const found = [];
    for (let i = tokens.injection.indexOf(1) < 0 && tokens.injection.indexOf(2) < 0 ? tokens.n : 0; i < tokens.n; i++) {
      if (isInjected(i) && !isInjected(i - 1)) found.push([i, i + 1]);
      else if (isInjected(i)) found[found.length - 1][1] = i + 1;
    }
    return found;
  }
  function drawMap() {
    mapped = 0;
    const height = view.clientHeight, ratio = window.devicePixelRatio || 1, rows = Math.round(height * ratio), width = Math.round(44 * ratio);
    if (!rows || !tokens.n) return;
    if (map.height !== rows || map.width !== width) { map.height = rows; map.width = width; map.style.height = `${height}px`; base = null; }
    base ??= drawBase(rows, width);
    const draw = map.getContext("2d"), ink = getComputedStyle(root).color, row = (i) => Math.floor(i * rows / tokens.n);
    draw.clearRect(0, 0, width, rows);
    draw.drawImage(base, 0, 0);
    draw.fillStyle = ink;
    for (const [k] of hits.slice(0, 2000)) draw.fillRect(0, row(k), width * 0.15, Math.max(1, ratio));
    if (shown >= 0) draw.fillRect(0, row(shown) - ratio, width, 2 * ratio);
    const [top, bottom] = visibleRange();
    draw.strokeStyle = ink;
    draw.lineWidth = ratio;
    draw.strokeRect(ratio / 2, row(top) + ratio / 2, width - ratio, Math.max(4 * ratio, row(bottom) - row(top)) - ratio);
  }
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = map.getBoundingClientRect(), i = Math.max(0, Math.min(tokens.n - 1, Math.floor((event.clientY - box.top) / box.height * tokens.n)));
    const block = blockOf(i);
    fill(block);
    const span = block.spans[i - block.start];
    view.scrollTop += span.getBoundingClientRect().top - view.getBoundingClientRect().top - view.clientHeight / 2;
  };
  map.addEventListener("pointerdown", (event) => { map.setPointerCapture(event.pointerId); drag(event); });
  map.addEventListener("pointermove", drag);

  const resized = new ResizeObserver(([entry]) => {
    const width = entry.contentRect.width;
    if (width && Math.abs(width - viewWidth) > 0.1 * viewWidth) { viewWidth = width; estimate(); }
    if (waiting && view.clientHeight && shown >= 0) show(shown); else seek();
    const dragged = view.style.height;
    if (dragged !== tall && view.clientHeight) { tall = dragged; keep(memory, Math.round(parseFloat(dragged))); }
    frame();
  });
  resized.observe(view);
  const colours = () => { read(); choices(); recolour(); };
  const rebuild = () => {
    hits = []; hit = new Set(); shown = -1; moved = false; search.value = ""; count.textContent = "";
    read(); build(); choices(); around(current());
    if (model.get("selected") >= 0) show(model.get("selected")); else seek();
  };
  const chose = () => { const i = model.get("selected"); if (i !== shown) show(i); };
  const told = (act) => () => {
    try { act(); } catch (error) { message.textContent = `This view cannot be shown: ${error.message}`; message.hidden = false; }
  };
  const listeners = { "change:tokens": rebuild, "change:masks": colours, "change:heats": colours, "change:view": recolour, "change:a": recolour, "change:b": recolour,
    "change:heat": recolour, "change:predicting": recolour, "change:message": recolour, "change:selected": chose,
    comm_live_update: () => { gone = true; around(current()); } };
  for (const name of Object.keys(listeners)) model.on(name, listeners[name] = told(listeners[name]));
  rebuild();
  return () => {
    watcher.disconnect(); resized.disconnect(); clearTimeout(timer); cancelAnimationFrame(mapped);
    for (const [name, act] of Object.entries(listeners)) model.off(name, act);
    root.remove();
  };
}

const renderStrip = guarded(({ model, el }) => createStrip(el, model));
