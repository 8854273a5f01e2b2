// A stand-in for the model of a widget, in a page without a kernel: the same names, the state from the page itself.
function pageModel(state) {
  const listeners = new Map();
  return {
    get: (name) => state[name],
    set(name, value) {
      if (state[name] === value) return;
      state[name] = value;
      for (const act of [...(listeners.get(`change:${name}`) || [])]) act();
    },
    save_changes() {}, send() {},
    on(name, act) { listeners.set(name, [...(listeners.get(name) || []), act]); },
    off(name, act) { listeners.set(name, (listeners.get(name) || []).filter((other) => other !== act)); },
  };
}

// Bytes stand in the JSON as {"base64": "…"} and come out as a DataView, as a kernel would send them.
function readState(text) {
  return JSON.parse(text, (key, value) => {
    if (value === null || typeof value !== "object" || Object.keys(value).length !== 1 || typeof value.base64 !== "string") return value;
    return new DataView(Uint8Array.from(atob(value.base64), (c) => c.charCodeAt(0)).buffer);
  });
}
