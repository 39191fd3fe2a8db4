// The API's documentation, drawn from the server's own OpenAPI document.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A description: what stands between backticks is code. */
const words = (text = "") => text.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));

let schemas = {};

const resolved = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").at(-1)] ?? {} : schema ?? {});

/** What values a schema allows, in a few words. */
function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return [...new Set(choices.map(kind))].join(" | ");
  if (schema.type === "array") return `list of ${schema.items ? kind(schema.items) : "anything"}`;
  const [low, high] = [schema.minimum ?? schema.exclusiveMinimum, schema.maximum ?? schema.exclusiveMaximum];
  const isWide = high === undefined || high >= 2 ** 31 - 1;
  const range = low === undefined ? "" : isWide ? ` \u2265 ${low}` : ` ${low}\u2013${high}`;
  return (schema.type ?? "anything") + range;
}

function fields(schema) {
  const { properties = {}, required = [] } = resolved(schema);
  const rows = Object.entries(properties).map(([name, about]) => make("tr", {},
    make("th", { scope: "row" }, make("code", {}, name), required.includes(name) ? " *" : ""),
    make("td", { className: "kind" }, kind(about)),
    make("td", {}, ...words(about.description))));
  return make("table", {}, make("tbody", {}, ...rows));
}

function example(path, method) {
  const url = new URL(`.${path}`, document.baseURI).href;
  if (method === "get") return `curl ${url}`;
  const bodies = {
    "/v1/chat/completions": { messages: [{ role: "user", content: "Write a function that adds." }], max_tokens: 64 },
    "/v1/completions": { prompt: "def add(a, b):\n    return ", suffix: "\n", max_tokens: 4 },
    "/infill": { input_prefix: "def add(a, b):\n    return ", input_suffix: "\n", n_predict: 8 },
    "/v1/fim/completions": { prompt: "def add(a, b):\n    return ", suffix: "\n", max_tokens: 8 },
  };
  const body = bodies[path] ?? { messages: [{ role: "user", content: "Write a function that adds." }], max_tokens: 64 };
  return `curl ${url} -H 'Content-Type: application/json' -d '${JSON.stringify(body)}'`;
}

function article(path, method, about) {
  const id = `${method}${path}`.replace(/\W+/g, "-");
  const schema = about.requestBody?.content["application/json"].schema;
  const replies = Object.entries(about.responses ?? {});
  const reply = about.responses?.["200"]?.content?.["application/json"]?.schema;
  const element = make("article", { id },
    make("h2", {}, make("span", { className: "method" }, method.toUpperCase()), path),
    make("p", { className: "lead" }, ...words(about.description ?? about.summary)),
    make("pre", { tabIndex: 0 }, example(path, method)));
  if (schema) element.append(make("h3", {}, "Request (* required)"), fields(schema));
  if (reply && resolved(reply).properties) element.append(make("h3", {}, "Answer"), fields(reply));
  if (replies.length > 1) {
    const rows = replies.map(([status, { description }]) => make("tr", {},
      make("th", { scope: "row" }, make("code", {}, status)), make("td", {}, ...words(description))));
    element.append(make("h3", {}, "Statuses"), make("table", {}, make("tbody", {}, ...rows)));
  }
  const link = make("a", { href: `#${id}` }, make("span", { className: "method" }, method.toUpperCase()), path);
  return { element, link };
}

function parts(names) {
  const shown = names.filter((name) => schemas[name].properties);
  return shown.map((name) => make("article", { id: name }, make("h2", {}, name),
    make("p", { className: "lead" }, ...words(schemas[name].description)), fields(schemas[name])));
}

async function start() {
  const main = document.getElementById("endpoints");
  let document_;
  try {
    const response = await fetch(new URL("openapi.json", document.baseURI));
    if (!response.ok) throw new TypeError(`status ${response.status}`);
    document_ = await response.json();
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    main.replaceChildren(make("p", { className: "fault", role: "alert" }, "openapi.json cannot be loaded. Is the server still running?"));
    return;
  }
  schemas = document_.components.schemas;
  const all = Object.entries(document_.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) => article(path, method, about)));
  const types = parts(Object.keys(schemas).sort());
  main.replaceChildren(...all.map(({ element }) => element), ...types);
  document.getElementById("contents").replaceChildren(...all.map(({ link }) => link));
  if (location.hash) document.querySelector(location.hash.replace(/[^#\w-]/g, ""))?.scrollIntoView();
}

start();
