// The page of `dreamer play`: it shows what the server sends and sends what keys and buttons ask for.

const $ = id => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token") ?? "";
const socket = new WebSocket(`ws://${location.host}/play?token=${encodeURIComponent(token)}`);
socket.binaryType = "arraybuffer";

let told = null; // what the server said of the task
let now = null; // the newest frame's header
let history = []; // headers by step, of the branch that is played
const held = new Set(); // codes of keys, twins replaced

const send = command => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(command)); };

socket.onclose = event => {
  $("state").className = "lost";
  $("state").textContent = event.reason || (told ? "connection lost; reload the page" : "not let in; open the printed address");
};
socket.onmessage = ({ data }) => {
  if (typeof data !== "string") return show(data);
  const message = JSON.parse(data);
  if (message.hello) welcome(message);
  else say(message.note ?? message.error, "error" in message);
};

function say(text, wrong) {
  $("message").textContent = text ?? "";
  $("message").className = wrong ? "error" : "";
}

// What the task is like

function welcome(message) {
  told = message;
  document.title = `${message.hello}: dreamer play`;
  $("task").textContent = message.hello;
  for (const name of message.actors) $("who").append(new Option(name, name));
  $("who").value = message.actor;
  [$("speed").min, $("speed").max] = message.speeds;
  const rows = message.keyboard.keys.map(key => {
    const row = document.createElement("tr");
    row.dataset.keys = key.keys.join(" ");
    const [keys, label] = [row.insertCell(), row.insertCell()];
    for (const code of key.keys) keys.append(cap(code), " ");
    label.textContent = key.label;
    return row;
  });
  $("keys").append(...rows.sort((a, b) => a.dataset.keys.split(" ").length - b.dataset.keys.split(" ").length));
  makeSliders(message.actions);
  if (!message.real) {
    $("real-box").hidden = $("difference-box").hidden = true;
    $("stage").classList.add("alone");
    $("real-note").textContent = message.alone;
    say(message.alone);
  }
}

const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓" };
const name = code => NAMES[code] ?? code.replace(/^(Key|Digit)/, "");
function cap(code) {
  const key = document.createElement("kbd");
  const twin = Object.keys(told.twins).find(other => told.twins[other] === code);
  key.textContent = twin ? `${name(code)} ${name(twin)}` : name(code);
  return key;
}

// Sliders for numbers, menus for choices; a single choice has keys only.
let controls = [];
function makeSliders(actions) {
  for (const [key, { classes, size }] of Object.entries(actions)) {
    if (Object.keys(actions).length === 1 && classes && size === 1) continue;
    for (let place = 0; place < size; place++) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      const output = document.createElement("output");
      input.type = "range";
      [input.min, input.max, input.step] = classes ? [0, classes[place] - 1, 1] : [-1, 1, 0.05];
      input.value = output.textContent = 0;
      input.oninput = () => { output.textContent = input.value; send({ do: "act", action: byHand() }); };
      label.append(size > 1 ? `${key} ${place + 1}` : key, input, output);
      $("sliders").append(label);
      controls.push({ key, place, input, output, single: classes && size === 1 });
    }
  }
}
function byHand() {
  const action = {};
  for (const { key, place, input, single } of controls) {
    if (single) action[key] = Number(input.value);
    else (action[key] ??= [])[place] = Number(input.value);
  }
  return action;
}
function moveSliders(action) {
  for (const { key, place, input, output } of controls) {
    input.value = output.textContent = [action[key]].flat()[place];
  }
}

// Keys

const twin = code => told?.twins[code] ?? code;
const meant = () => told.keyboard.keys.find(key => key.keys.every(code => held.has(code)));
const used = code => told.keyboard.keys.some(key => key.keys.includes(code));
const OTHERS = { KeyP: () => $("play").click(), Period: () => $("step").click(), Comma: () => $("back").click(), KeyR: () => $("reset").click() };

addEventListener("keydown", event => {
  if (!told || event.ctrlKey || event.metaKey || event.altKey || ["SELECT"].includes(event.target.tagName)) return;
  const code = twin(event.code);
  if (used(code)) {
    event.preventDefault();
    if (event.repeat && now?.playing) return;
    held.add(code);
    act(true);
    if (now && !now.playing && now.actor === "person") send({ do: "step" });
  } else if (OTHERS[event.code] && !event.repeat) {
    event.preventDefault();
    OTHERS[event.code]();
  }
});
addEventListener("keyup", event => {
  if (told && held.delete(twin(event.code))) act(false);
});
addEventListener("blur", () => { if (held.size) { held.clear(); act(false); } });

function act(tap) {
  const found = meant();
  for (const row of $("keys").rows) row.classList.toggle("held", Boolean(found) && row.dataset.keys === found.keys.join(" "));
  const action = found?.action ?? told.keyboard.idle;
  if (!action) return;
  if (controls.length) moveSliders(action);
  send({ do: "act", action, ...(found && tap ? { tap: true } : {}) });
}

// Buttons

$("play").onclick = () => send({ do: "play", on: !now?.playing });
$("step").onclick = () => send({ do: "step" });
$("back").onclick = () => now && send({ do: "seek", at: Math.max(0, now.at - 1) });
$("reset").onclick = () => { say(""); send({ do: "reset" }); };
$("who").onchange = () => { send({ do: "who", name: $("who").value }); $("who").blur(); };
$("speed").oninput = () => { $("speed-shown").textContent = $("speed").value; send({ do: "speed", fps: Number($("speed").value) }); };
$("seek").oninput = () => send({ do: "seek", at: Number($("seek").value) });
for (const what of ["gif", "episode"]) $(what).onclick = () => { say("saving"); send({ do: "save", what }); };
for (const button of document.querySelectorAll("button")) button.addEventListener("click", () => button.blur());

// What is seen

function show(data) {
  const length = new DataView(data).getUint32(0, true);
  now = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  let offset = 4 + length;
  const pictures = {};
  for (const [kind, height, width] of now.pictures) {
    pictures[kind] = { height, width, pixels: new Uint8Array(data, offset, height * width * 3) };
    offset += height * width * 3;
  }
  history.length = Math.min(history.length, now.last + 1); // a branch forgets what came later
  history[now.at] = now;
  for (const kind of ["dream", "real"]) if (pictures[kind]) paint($(kind), pictures[kind], (pixels, i) => pixels[i]);
  const { dream, real } = pictures;
  const comparable = dream && real && dream.pixels.length === real.pixels.length;
  if (comparable) paint($("difference"), dream, (pixels, i) => 128 + (pixels[i] - real.pixels[i]) / 2);
  tell(Boolean(dream), Boolean(real), comparable);
  document.body.dataset.step = now.at; // for programs that look at the page
}

function paint(canvas, { height, width, pixels }, value) {
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let i = 0, j = 0; i < pixels.length; i += 3, j += 4) {
    for (let c = 0; c < 3; c++) image.data[j + c] = value(pixels, i + c);
    image.data[j + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

const digits = (x, n = 2) => x == null ? "" : (Object.is(Math.round(x * 10 ** n), -0) ? 0 : x).toFixed(n);

function tell(dream, real, comparable) {
  $("dream-box").hidden = !dream;
  $("dream-box").classList.toggle("unsure", now.unsure);
  $("dream-box").classList.toggle("over", now.ended[0]);
  $("real-box").classList.toggle("over", now.ended[1]);
  $("dream-score").textContent = `score ${digits(now.scores[0])}`;
  $("real-score").textContent = `score ${digits(now.scores[1])}`;
  $("difference-size").textContent = now.difference == null ? "" : digits(now.difference, 4);
  if (told.real) {
    $("difference-box").hidden = !comparable && !(dream && !real);
    $("stage").classList.toggle("pair", $("difference-box").hidden);
    const missing = now.failure ? `The real environment failed: ${now.failure}` : now.ended[1] ? "" :
      !real && now.difference == null ? "Reality does not follow: this environment has no earlier state to go back to. Begin a new episode." :
      real ? "" : "This environment draws no pictures.";
    $("real-note").hidden = !missing;
    $("real-note").textContent = missing;
  }
  $("seek").max = now.last;
  $("seek").value = now.at;
  $("step-shown").textContent = `step ${now.at}` + (now.last > now.at ? ` of ${now.last}` : "");
  $("parted").className = !told.real ? "" : now.parted == null ? "together" : "apart";
  $("parted").textContent = !told.real ? "" : now.parted == null ? "Dream and reality are alike so far." : `They parted at step ${now.parted}.`;
  $("play").textContent = now.playing ? "Pause" : "Play";
  $("who").value = now.actor;
  if (document.activeElement !== $("speed")) { $("speed").value = now.speed; $("speed-shown").textContent = now.speed; }
  $("state").className = now.behind ? "behind" : "";
  $("state").textContent = now.behind ? `falls behind: ${now.rate} of ${now.speed} frames/s` : now.playing ? `${digits(now.rate, 0)} frames/s` :
    now.ended[0] ? "the dream is over; R begins a new one" : now.full ? "the history is full; R begins a new episode" : "paused";
  for (const key of ["reward", "cont", "value"]) {
    $(key).textContent = digits(now[key], key === "cont" ? 3 : 2);
    chart($(`${key}-chart`), [history.map(one => one[key])], key === "cont" ? [0, 1] : null);
  }
  const most = Math.max(...history.slice(1).map(one => one?.entropy ?? 0), now.entropy, 1e-6);
  $("entropy").textContent = `${digits(now.entropy, 1)} nats`;
  $("entropy-bar").className = now.unsure ? "unsure" : "";
  $("entropy-bar").firstElementChild.style.width = `${100 * now.entropy / most}%`;
  $("acted").textContent = now.at ? `${now.acted}: ${named(now.action)}` : "";
  if (now.numbers[0].length) {
    $("numbers-box").hidden = false;
    $("numbers").classList.toggle("unsure", now.unsure);
    const lines = [0, 1].flatMap(kind => now.numbers[0].map((_, i) => history.map(one => one?.numbers[kind][i])));
    chart($("numbers"), lines, null, now.numbers[0].length);
  }
}

function named(action) {
  return Object.entries(action).map(([key, values]) => {
    const names = told.actions[key].names;
    return names ? names[values[0]] : values.slice(0, 6).map(x => Number.isInteger(x) ? x : digits(x)).join(" ");
  }).join(", ");
}

// Running curves; of `solid` lines the rest is dashed.
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"];
function chart(canvas, lines, range, solid = lines.length) {
  const scale = devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== width * scale) [canvas.width, canvas.height] = [width * scale, height * scale];
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  const values = lines.flat().filter(x => x != null);
  let [low, high] = range ?? [Math.min(0, ...values), Math.max(0, ...values)];
  if (high - low < 1e-9) [low, high] = [low - 1, high + 1];
  const steps = Math.max(20, history.length - 1);
  const at = (step, x) => [2 + (width - 4) * step / steps, height - 3 - (height - 6) * (x - low) / (high - low)];
  const style = getComputedStyle(document.body);
  const draw = (points, color, dash, thick) => {
    context.beginPath();
    points.forEach((point, i) => i ? context.lineTo(...point) : context.moveTo(...point));
    [context.strokeStyle, context.lineWidth] = [color, thick];
    context.setLineDash(dash);
    context.stroke();
  };
  draw([at(0, 0), at(steps, 0)], style.getPropertyValue("--line"), [], 1);
  lines.forEach((line, i) => {
    const points = [...line.entries()].filter(([, x]) => x != null).map(([step, x]) => at(step, x));
    const one = lines.length === 1 ? style.getPropertyValue("--accent") : COLORS[i % solid % COLORS.length];
    draw(points, one, i < solid ? [] : [4, 3], 1.5);
  });
  draw([at(now.at, low), at(now.at, high)], style.getPropertyValue("--soft"), [], 1);
}
