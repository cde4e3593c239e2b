//! The live page in Chromium: its display for a person on call, and the effects that it must not have.

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use axum::{Extension, Router, extract::ConnectInfo, routing::get};
use buttress::{
    BoxError, CircuitBreakerLayer, Health, HealthProbeLayer, Lifecycle, Outcome, Trip,
    breaker::{CircuitState, OpenDuration},
    config::{ClientConfig, ServerConfig},
    observe::Registry,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep},
};
use tower::{ServiceBuilder, ServiceExt, service_fn};

use crate::support::{
    alone, ms,
    programs::{
        chromium::{Chromium, axe_core},
        skip,
    },
    secs,
};

type Body = Empty<Bytes>;

/// A process with the page. Dropping it cuts its connections.
struct Process {
    address: SocketAddr,
    registry: Registry,
    lifecycle: Lifecycle,
    tasks: Vec<AbortHandle>,
}

impl Process {
    /// Starts a process that serves the page and these routes.
    async fn start(port: u16, registry: Registry, routes: Router) -> Self {
        let health = Health::new();
        let lifecycle = Lifecycle::without_signals(&health).unwrap();
        registry.watch(&lifecycle).unwrap();
        let sampler = tokio::spawn(registry.run());
        let dashboard =
            registry.dashboard().title("checkout").loopback().controls(|_| Some("a test"));
        let app = routes.layer(lifecycle.layer()).layer(dashboard.layer().unwrap());
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        lifecycle.ready();
        let server = lifecycle.clone();
        let server = tokio::spawn(async move {
            let service = move |peer: SocketAddr| app.clone().layer(Extension(ConnectInfo(peer)));
            server.serve_each(listener, service).await
        });
        let tasks = vec![sampler.abort_handle(), server.abort_handle()];
        Self { address, registry, lifecycle, tasks }
    }

    fn url(&self) -> String {
        format!("http://{}/buttress/", self.address)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

fn breaker(registry: &Registry, name: &str) -> CircuitBreakerLayer {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(5));
    let layer = layer.open_for(OpenDuration::fixed(secs(30))).name(name);
    registry.watch(&layer.handle()).unwrap();
    layer
}

fn trip(layer: &CircuitBreakerLayer) {
    for _ in 0..5 {
        layer.handle().record(Outcome::failure());
    }
}

/// Asserts that the page has requested nothing elsewhere, and that its console is empty.
#[track_caller]
fn assert_clean(browser: &Chromium, process: &Process) {
    assert_eq!(browser.errors(), Vec::<String>::new());
    let requested = browser.requested();
    assert!(requested.len() >= 2, "{requested:?}");
    for url in requested {
        assert!(url.starts_with(&process.url()) || url == "about:blank", "{url}");
    }
}

const LIVE: &str = "document.getElementById('mark').textContent.startsWith('● live')";

#[tokio::test]
async fn opening_circuit_appears_within_two_seconds_with_reason_and_countdown() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let registry = Registry::new();
    let search = breaker(&registry, "search");
    let process = Process::start(0, registry, Router::new()).await;
    browser.open(&process.url()).await;
    let verdict = "document.getElementById('verdict-text').textContent";
    browser.wait_until(&format!("{verdict} === 'All 2 layers are healthy'"), secs(5)).await;
    browser.wait_until(LIVE, secs(5)).await;
    assert_eq!(browser.eval("document.title").await, "checkout: All 2 layers are healthy");

    trip(&search);
    let attention = "document.getElementById('attention').innerText";
    let shown = format!("{attention}.includes('circuit breaker search')");
    let took = browser.wait_until(&shown, secs(2)).await;
    println!("the open circuit appeared after {took:?}");
    let text = browser.eval(attention).await;
    let text = text.as_str().unwrap();
    assert!(text.contains("5 failures in a row"), "{text}");
    assert!(text.contains("Ends in 30 s.") || text.contains("Ends in 29 s."), "{text}");
    assert!(text.contains("half-open probe"), "{text}");
    browser.wait_until(&format!("{attention}.includes('Ends in 27 s.')"), secs(5)).await;
    // The verdict changes at most once in 5 s.
    let counted = format!("{verdict} === '1 of 2 layers needs attention'");
    browser.wait_until(&counted, secs(6)).await;
    let row = browser.eval("document.querySelector('#layers .failing').innerText").await;
    let row = row.as_str().unwrap();
    assert!(row.contains("failing: open") && row.contains("failures"), "{row}");
    let decision = browser.eval("document.querySelector('#decisions tr').innerText").await;
    assert!(decision.as_str().unwrap().contains("circuit opened"), "{decision}");

    search.handle().reset();
    browser.wait_until("document.getElementById('attention').hidden", secs(2)).await;
    browser.wait_until("!document.querySelector('#layers .layer')", secs(6)).await;
    assert_clean(&browser, &process);
}

#[tokio::test]
async fn lost_data_is_marked_as_old_and_a_restart_is_stated() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let registry = Registry::new();
    let _search = breaker(&registry, "search");
    let process = Process::start(0, registry, Router::new()).await;
    browser.open(&process.url()).await;
    browser.wait_until(LIVE, secs(5)).await;
    assert_clean(&browser, &process);

    let port = process.address.port();
    drop(process);
    browser.wait_until("!document.getElementById('alert').hidden", secs(6)).await;
    let count = "document.getElementById('alert-count').textContent";
    let lost = browser.eval(count).await;
    let lost = lost.as_str().unwrap();
    assert!(
        lost.starts_with("⚠ Nothing received for ") && lost.ends_with("the data below is old"),
        "{lost}"
    );
    // The text of the alert for screen readers does not change each second.
    let alert = browser.eval("document.querySelector('[role=alert]').textContent").await;
    assert!(alert.as_str().unwrap().starts_with("Nothing received for "), "{alert}");
    browser.wait_until(&format!("{count} !== {:?}", lost), secs(3)).await;
    assert_eq!(browser.eval("document.getElementById('main').className").await, "is-stale");
    let filter = "getComputedStyle(document.getElementById('verdict')).filter";
    assert_eq!(browser.eval(filter).await, "grayscale(1)");
    assert!(browser.text().await.contains("not connected"));

    let registry = Registry::new();
    let _search = breaker(&registry, "reports");
    let process = Process::start(port, registry, Router::new()).await;
    let notice = "document.getElementById('notice').innerText";
    browser
        .wait_until(&format!("{notice}.startsWith('The process restarted at ')"), secs(20))
        .await;
    browser.wait_until(LIVE, secs(5)).await;
    assert_eq!(browser.eval("document.getElementById('alert').hidden").await, true);
    assert_eq!(browser.eval("document.getElementById('main').className").await, "");
    let quiet = browser.eval("document.getElementById('quiet-text').textContent").await;
    assert!(quiet.as_str().unwrap().contains("circuit breaker reports"), "{quiet}");
    assert_eq!(browser.events("Runtime.exceptionThrown").len(), 0);

    // If the stream ends and the process is the same, the page states no restart.
    process.lifecycle.drain();
    process.lifecycle.skip_delay();
    browser.wait_until("document.getElementById('mark').textContent.includes('polling') || !document.getElementById('alert').hidden", secs(10)).await;
}

#[tokio::test]
async fn page_without_a_free_stream_polls() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let registry = Registry::new();
    let search = breaker(&registry, "search");
    let process = Process::start(0, registry, Router::new()).await;
    let client = reqwest::Client::new();
    let mut streams = Vec::new();
    for _ in 0..16 {
        let stream = client.get(format!("{}events", process.url())).send().await.unwrap();
        assert_eq!(stream.status(), 200);
        streams.push(stream);
    }
    browser.open(&process.url()).await;
    let polls = "document.getElementById('mark').textContent.startsWith('◌ polling every 5 s')";
    browser.wait_until(polls, secs(5)).await;
    trip(&search);
    let shown = "document.getElementById('attention').innerText.includes('5 failures in a row')";
    browser.wait_until(shown, secs(7)).await;
    assert_eq!(browser.eval("document.getElementById('alert').hidden").await, true);
    // A free stream is found again.
    streams.clear();
    browser.wait_until(LIVE, secs(25)).await;
    assert_eq!(browser.events("Runtime.exceptionThrown").len(), 0);
    let statuses = browser.events("Network.responseReceived");
    let declined = statuses.iter().filter(|event| event["params"]["response"]["status"] == 503);
    assert!(declined.count() >= 1);
}

#[tokio::test]
async fn hidden_page_has_no_stream() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let process = Process::start(0, Registry::new(), Router::new()).await;
    browser.open(&process.url()).await;
    browser.wait_until(LIVE, secs(5)).await;
    let hide = |hidden: bool| {
        format!(
            "Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }});
             document.dispatchEvent(new Event('visibilitychange'))"
        )
    };
    browser.eval(&hide(true)).await;
    assert!(browser.text().await.contains("paused"));
    // All 16 streams are free.
    let client = reqwest::Client::new();
    let mut streams = Vec::new();
    let start = Instant::now();
    while streams.len() < 16 {
        assert!(start.elapsed() < secs(5), "{} streams", streams.len());
        let stream = client.get(format!("{}events", process.url())).send().await.unwrap();
        match stream.status() {
            StatusCode::OK => streams.push(stream),
            _ => sleep(ms(20)).await,
        }
    }
    streams.clear();
    sleep(ms(3500)).await;
    assert_eq!(browser.eval("document.getElementById('alert').hidden").await, true);
    browser.eval(&hide(false)).await;
    browser.wait_until(LIVE, secs(5)).await;
    assert_clean(&browser, &process);
}

#[tokio::test]
async fn controls_need_a_confirmation_and_work_by_keyboard() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let registry = Registry::new();
    // The name needs encoding in the path, and in the header.
    let name = "søk/1 \"%2f\" <b>";
    let search = breaker(&registry, name);
    search.handle().force_open();
    let process = Process::start(0, registry, Router::new()).await;
    browser.open(&process.url()).await;
    browser.wait_until("!!document.querySelector('.controls button')", secs(5)).await;
    let focused = "document.activeElement.textContent";
    browser.eval("document.querySelectorAll('.controls button')[2].focus()").await;
    assert_eq!(browser.eval(focused).await, "Reset");
    browser.press("Enter").await;
    assert_eq!(browser.eval(focused).await, "Confirm");
    browser.press("Escape").await;
    assert_eq!(browser.eval(focused).await, "Reset");
    assert_eq!(search.handle().state(), CircuitState::ForcedOpen);
    browser.press("Enter").await;
    // The question survives the next ticks.
    sleep(ms(1500)).await;
    assert_eq!(browser.eval(focused).await, "Confirm");
    browser.press("Enter").await;
    let notice = "document.getElementById('notice').innerText.endsWith(': done')";
    browser.wait_until(notice, secs(5)).await;
    assert_eq!(search.handle().state(), CircuitState::Closed);
    let decided = "document.getElementById('decisions').innerText.includes('by a test')";
    browser.wait_until(decided, secs(3)).await;
    assert_eq!(browser.eval("document.querySelectorAll('b:not(.track b)').length").await, 0);
    assert_clean(&browser, &process);
}

#[tokio::test]
async fn hostile_names_are_shown_as_texts() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let registry = Registry::new();
    let names = [
        "</script><script>window.hacked = 1</script>",
        "<img src=x onerror='window.hacked = 1'>",
        "\u{202e}\"'`${window.hacked = 1}",
        "javascript:window.hacked=1//",
        "__proto__",
        "constructor",
    ];
    let layers: Vec<_> = names.iter().map(|name| breaker(&registry, name)).collect();
    layers.iter().for_each(trip);
    let process = Process::start(0, registry, Router::new()).await;
    browser.open(&process.url()).await;
    let all = format!("document.querySelectorAll('#layers .layer').length === {}", names.len());
    browser.wait_until(&all, secs(5)).await;
    sleep(ms(1500)).await;
    let shown = browser
        .eval("Array.from(document.querySelectorAll('.layer .name'), (name) => name.textContent).sort()")
        .await;
    let mut expected = names.map(str::to_owned);
    expected.sort();
    assert_eq!(shown, json!(expected));
    assert_eq!(browser.eval("window.hacked === undefined").await, true);
    assert_eq!(browser.eval("document.querySelectorAll('img').length").await, 0);
    assert_eq!(browser.eval("document.querySelectorAll('script').length").await, 1);
    // Each link leads to its layer.
    let led = "Array.from(document.querySelectorAll('#attention a')).every((link) => !!document.querySelector(link.getAttribute('href')))";
    assert_eq!(browser.eval(led).await, true);
    assert_clean(&browser, &process);
}

// ===== Secrets =====

const SECRET: &str = "hunter2";

#[tokio::test]
async fn page_shows_no_secret_of_a_call_or_a_probe() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let upstream = Router::new().fallback(async || {
        let secret = [("x-session", SECRET), ("set-cookie", SECRET)];
        (StatusCode::SERVICE_UNAVAILABLE, secret, SECRET)
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, upstream).await });

    let registry = Registry::new();
    let client = ClientConfig::load("search")
        .toml(&format!(
            "retry_backoff = '5ms'\nhealth_probe_every = '200ms'\nhealth_probe_uri = 'http://{address}/{SECRET}?key={SECRET}'"
        ))
        .finish()
        .unwrap();
    let client = buttress::client::<Full<Bytes>>(&client).unwrap();
    registry.watch(&client.handle()).unwrap();
    let failing = service_fn(async |_: Request<Full<Bytes>>| {
        let error = format!("cannot log in to db://root:{SECRET}@10.0.0.7/x?password={SECRET}");
        Err::<Response<Full<Bytes>>, _>(BoxError::from(error))
    });
    let probe = HealthProbeLayer::get("/healthz").every(ms(200)).thresholds(1, 1).name("db");
    registry.watch(&probe.handle()).unwrap();
    let _probed = ServiceBuilder::new().layer(probe).service(failing);
    let health = Health::new();
    registry.watch(&health).unwrap();
    let disk = health.reporter("disk").unwrap();
    disk.fail_because(format!("password {SECRET} was declined"));
    let process = Process::start(0, registry, Router::new()).await;
    for _ in 0..30 {
        let request = Request::post(format!("http://{address}/{SECRET}?token={SECRET}"))
            .header("authorization", format!("Bearer {SECRET}"))
            .header("cookie", SECRET)
            .body(Full::from(SECRET));
        let _ = client.clone().oneshot(request.unwrap()).await;
    }
    browser.open(&process.url()).await;
    browser.wait_until("document.getElementById('decisions').children.length > 0", secs(5)).await;
    browser.eval("document.getElementById('expand').click()").await;
    sleep(secs(2)).await;
    let text = browser.text().await;
    for part in ["circuit breaker", "search", "db", "health"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains(SECRET), "{text}");
    let html = browser.eval("document.documentElement.outerHTML").await;
    assert!(!html.as_str().unwrap().contains(SECRET), "{html}");
    let json = reqwest::get(format!("{}status.json", process.url())).await.unwrap();
    let json = json.text().await.unwrap();
    assert!(json.contains("\"db\"") && !json.contains(SECRET), "{json}");
    assert_clean(&browser, &process);
}

// ===== A real scenario =====

/// An upstream that fails while `fails` is set, and for a few calls otherwise.
async fn upstream(fails: Arc<AtomicBool>) -> SocketAddr {
    let calls = Arc::new(AtomicU64::new(0));
    let respond = move || {
        let nth = calls.fetch_add(1, Relaxed);
        let is_down = fails.load(Relaxed);
        async move {
            sleep(ms(5 + nth % 20)).await;
            let fails = is_down || nth % 23 == 0;
            if fails { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
        }
    };
    let app = Router::new().route("/", get(respond)).route("/healthz", get(async || "ok"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// A process under load: clients of two upstreams, and a server with a limit of calls.
struct Scenario {
    process: Process,
    /// The upstream `search` fails.
    outage: Arc<AtomicBool>,
    /// The number of slow calls at a time. The server admits 10, and 10 may wait.
    slow: Arc<AtomicU64>,
    _load: JoinSet<()>,
    _health: (Health, buttress::health::Reporter),
}

impl Scenario {
    async fn start() -> Self {
        let registry = Registry::new();
        let (outage, steady) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut load = JoinSet::new();
        for (name, fails) in [("search", outage.clone()), ("billing", steady)] {
            let address = upstream(fails).await;
            let config = ClientConfig::load(name)
                .toml(&format!(
                    "limit_max = 20\nlimit_queue = 10\nretry_backoff = '20ms'\nbreaker_open_for = '30s'\n\
                     connect_max_total = 20\n\
                     health_probe_uri = 'http://{address}/healthz'"
                ))
                .finish()
                .unwrap();
            let client = buttress::client::<Body>(&config).unwrap();
            registry.watch(&client.handle()).unwrap();
            for _ in 0..2 {
                let client = client.clone();
                load.spawn(async move {
                    loop {
                        let request = Request::get(format!("http://{address}/")).body(Body::new());
                        if let Ok(response) = client.clone().oneshot(request.unwrap()).await {
                            let _ = response.into_body().collect().await;
                        }
                        sleep(ms(40)).await;
                    }
                });
            }
        }
        let config = ServerConfig::load("front")
            .toml("limit_max = 10\nlimit_queue = 10\nlimit_queue_wait = '2s'")
            .finish()
            .unwrap();
        let server = buttress::server(&config).unwrap();
        registry.watch(&server.handle()).unwrap();
        let health = Health::new();
        registry.watch(&health).unwrap();
        let disk = health.reporter("disk").unwrap();
        disk.pass();
        let slow_handler = async || {
            sleep(ms(400)).await;
            "slow"
        };
        let routes = Router::new().route("/slow", get(slow_handler)).layer(server);
        let process = Process::start(0, registry, routes).await;
        let slow = Arc::new(AtomicU64::new(4));
        let url = format!("http://{}/slow", process.address);
        let visitors = reqwest::Client::new();
        for nth in 0..40 {
            let (visitors, url, slow) = (visitors.clone(), url.clone(), slow.clone());
            load.spawn(async move {
                loop {
                    if nth < slow.load(Relaxed) {
                        let _ = visitors.get(&url).send().await;
                    }
                    sleep(ms(50 + 7 * nth)).await;
                }
            });
        }
        Self { process, outage, slow, _load: load, _health: (health, disk) }
    }

    /// Lets the upstream fail and the server be full.
    async fn fail(&self) {
        self.outage.store(true, Relaxed);
        self.slow.store(40, Relaxed);
        let start = Instant::now();
        while self
            .process
            .registry
            .status()
            .layers
            .iter()
            .filter(|layer| layer.state == "open")
            .count()
            < 1
        {
            assert!(start.elapsed() < secs(20), "{:?}", self.process.registry.status());
            sleep(ms(50)).await;
        }
    }
}

/// Runs axe-core, and returns its findings as `impact: rule: elements`.
async fn findings(browser: &mut Chromium, axe: &Path) -> Vec<String> {
    // The protocol may evaluate it. The policy of the page would not permit the page to load it.
    let script = fs::read_to_string(axe).unwrap();
    browser.eval(&format!("{script}; true")).await;
    let found = browser.eval("axe.run(document, { resultTypes: ['violations'] })").await;
    assert!(found["passes"].as_array().is_some_and(|passes| passes.len() > 10), "{found}");
    let violations = found["violations"].as_array().unwrap().iter();
    let nodes = |found: &Value| {
        found["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|node| node["html"].to_string())
            .take(3)
            .collect::<Vec<_>>()
    };
    violations.map(|one| format!("{}: {}: {:?}", one["impact"], one["id"], nodes(one))).collect()
}

/// Returns a script that shows or hides the marks of old data.
fn show_stale(is_stale: bool) -> String {
    format!(
        "document.getElementById('main').classList.toggle('is-stale', {is_stale});
         document.getElementById('alert').hidden = !{is_stale};
         document.getElementById('alert-count').textContent = 'Nothing received for 7 s'"
    )
}

/// Returns the elements that can have the focus, and those that the key `Tab` has reached.
async fn reached_by_tab(browser: &mut Chromium) -> (Vec<Value>, Vec<Value>) {
    let name = "const nameOf = (e) => `${e.tagName} ${e.id || e.getAttribute('aria-label') || e.textContent.trim()}`;";
    let all = browser
        .eval(&format!(
            "(() => {{ {name} return Array.from(document.querySelectorAll('a[href], button, input')).filter((e) => e.checkVisibility()).map(nameOf); }})()"
        ))
        .await;
    let all = all.as_array().unwrap().clone();
    browser.eval("document.activeElement.blur()").await;
    let mut reached = Vec::new();
    for _ in 0..all.len() + 2 {
        browser.press("Tab").await;
        let focused = format!("(() => {{ {name} return nameOf(document.activeElement); }})()");
        reached.push(browser.eval(&focused).await);
        let outline = "(() => { const style = getComputedStyle(document.activeElement); return document.activeElement === document.body || style.outlineStyle !== 'none' })()";
        assert_eq!(browser.eval(outline).await, true, "the focus is not visible: {reached:?}");
    }
    (all, reached)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn page_of_an_outage_is_accessible_and_fits_narrow_screens() {
    let Some(mut browser) = Chromium::start(1280).await else { return skip("chromium") };
    let _alone = alone().await;
    let writes_docs = env::var_os("BUTTRESS_WRITE_DOCS").is_some();
    let scenario = Scenario::start().await;
    let process = &scenario.process;
    browser.open(&process.url()).await;
    browser.wait_until(LIVE, secs(5)).await;
    if writes_docs {
        // The screenshots show five minutes with two outages.
        sleep(secs(130)).await;
        scenario.fail().await;
        sleep(secs(8)).await;
        scenario.outage.store(false, Relaxed);
        scenario.slow.store(4, Relaxed);
        sleep(secs(140)).await;
    }
    scenario.fail().await;
    sleep(secs(if writes_docs { 12 } else { 4 })).await;
    let attention = "document.querySelectorAll('#attention li').length >= 2";
    browser.wait_until(attention, secs(10)).await;

    let sizes = [("light", 1120, "light"), ("dark", 1120, "dark"), ("narrow", 400, "light")];
    for (name, width, scheme) in sizes {
        browser.set_width(width).await;
        browser.prefer("prefers-color-scheme", scheme).await;
        browser.wait_until(&format!("innerWidth === {width}"), secs(5)).await;
        sleep(ms(500)).await;
        if writes_docs {
            let max_height = if name == "narrow" { 1500 } else { 900 };
            let image = browser.screenshot(width, max_height).await;
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
            fs::write(path.join(format!("dashboard-{name}.png")), image).unwrap();
        }
    }

    browser.eval("document.getElementById('expand').click()").await;
    for width in [1280, 1000, 760, 400, 360] {
        browser.set_width(width).await;
        browser.wait_until(&format!("innerWidth === {width}"), secs(5)).await;
        let widest = browser.eval("document.documentElement.scrollWidth").await;
        assert!(widest.as_u64().unwrap() <= width.into(), "{widest} at {width}");
    }
    browser.set_width(1280).await;
    browser.eval("window.scrollTo(0, 0)").await;

    match axe_core() {
        None => skip("axe-core"),
        Some(axe) => {
            for (scheme, is_stale) in
                [("light", false), ("dark", false), ("light", true), ("dark", true)]
            {
                browser.prefer("prefers-color-scheme", scheme).await;
                browser.eval(&show_stale(is_stale)).await;
                let findings = findings(&mut browser, &axe).await;
                println!("{scheme}, stale {is_stale}: {} findings of axe-core", findings.len());
                assert_eq!(findings, Vec::<String>::new(), "{scheme}, stale {is_stale}");
            }
            browser.eval(&show_stale(false)).await;
        }
    }

    let (all, reached) = reached_by_tab(&mut browser).await;
    assert!(all.len() > 8, "{all:?}");
    for element in &all {
        assert!(reached.contains(element), "{element} is not in {reached:?}");
    }
    browser.eval("document.getElementById('expand').focus()").await;
    browser.press("Enter").await;
    assert_eq!(browser.eval("document.getElementById('healthy').hidden").await, true);
    browser.eval("document.getElementById('filter').focus()").await;
    browser.write("circuit opened").await;
    let rows = "Array.from(document.querySelectorAll('#decisions tr'), (row) => row.innerText)";
    let rows = browser.eval(rows).await;
    let rows = rows.as_array().unwrap();
    assert!(!rows.is_empty());
    assert!(rows.iter().all(|row| row.as_str().unwrap().contains("circuit opened")), "{rows:?}");

    browser.prefer("prefers-reduced-motion", "reduce").await;
    let moves = "getComputedStyle(document.querySelector('.bar i')).transitionDuration";
    assert_eq!(browser.eval(moves).await, "0s");
    assert_clean(&browser, process);
}
