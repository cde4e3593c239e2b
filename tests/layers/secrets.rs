//! No text that a person reads contains a secret: userinfo, query, token, header value or the value of a variable.
//!
//! [`TABLE`] lists every type that shows text. To add a type, add a row that builds it from a [`Planted`] and returns
//! its text.

use std::{
    error::Error,
    fmt::{self, Debug, Display, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConfigError, ConnectLayer, DeadlineLayer, Health,
    HealthProbeLayer, Origin, Rejected, RespondLayer, RetryLayer, Trip,
    config::{
        CheckHealthConfig, ClientConfig, ConfigErrors, ConfigPreset, DeadlineConfig,
        HealthProbeConfig, RetryConfig, ServerConfig,
    },
    health::{Check, Get},
    reqwest::HttpClient,
    retry::RetryError,
    stack::ClientStack,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Empty, Full};
use proptest::prelude::*;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tracing::{
    Event, Metadata, Subscriber, field::Field, field::Visit, span, subscriber::DefaultGuard,
};

use crate::support::{net, tracing_events::listen};

type Body = Full<Bytes>;

// ===== Secrets =====

/// Occurs in every secret, and nowhere else.
const SECRET: &str = "Pl4nted";

/// A URI with secrets in its userinfo, query and fragment, and other secrets.
#[derive(Clone, Debug)]
struct Planted {
    uri: String,
    /// Before and after the URI in the text of an error.
    around: (&'static str, &'static str),
}

impl Planted {
    fn plain() -> Self {
        Self::new(
            "http://Pl4ntedUser:Pl4ntedPassword@search:8080/healthz?key=Pl4ntedKey#Pl4ntedTop",
        )
    }

    fn new(uri: &str) -> Self {
        Self { uri: uri.to_owned(), around: ("", "") }
    }

    /// The text of an error of a client, a pool, a driver.
    fn error(&self) -> Leak {
        let (before, after) = self.around;
        Leak(format!(
            "cannot reach {before}{}{after} (authorization: Bearer Pl4nted.t0ken)",
            self.uri
        ))
    }

    /// Whether clients can send the URI: not every client accepts every form.
    fn parsed(&self) -> Option<http::Uri> {
        self.uri.parse().ok()
    }
}

fn planted() -> impl Strategy<Value = Planted> {
    let scheme =
        prop_oneof![Just("http"), Just("HTTP"), Just("https"), Just("Https"), Just("redis")];
    // Percent-encoded userinfo, an `@` or `/` in it, sub-delimiters.
    let junk = "([a-zA-Z0-9.~!$&()*+,;=@/_-]|%40|%2F|%3a){0,4}";
    let host = prop_oneof![
        Just("search"),
        Just("[::1]:8080"),
        Just("10.0.0.7:80"),
        Just("[fe80::1%25eth0]")
    ];
    // With and without `=`.
    let query = "([a-z]{1,3}=)?";
    let around = prop_oneof![
        Just(("", "")),
        Just(("\"", "\"")),
        Just(("'", "'")),
        Just(("(", "): refused")),
        Just(("<", ">")),
        Just(("url: \"", "\" }")),
        Just(("\n", "\n")),
    ];
    (scheme, junk, junk, host, query, any::<prop::sample::Index>(), 0..8u8, around).prop_map(
        |(scheme, user, password, host, query, at, form, around)| {
            let mut uri = format!(
                "{scheme}://{user}{SECRET}{user}:{password}{SECRET}{password}@{host}/healthz?{query}{SECRET}Key"
            );
            let authority = uri.find("://").unwrap_or_default() + 3;
            match form {
                // A password that no parser accepts.
                0 => uri = format!("{scheme}://{SECRET}:{SECRET} {SECRET}@{host}/healthz?{SECRET}"),
                // Wrapped by a terminal or a log.
                1 => uri.insert(authority + at.index(uri.len() - authority), '\n'),
                2 => uri.insert_str(authority + at.index(uri.len() - authority), "\r\n    "),
                3 => uri.push_str("#Pl4ntedTop"),
                _ => {}
            }
            Planted { uri, around }
        },
    )
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Leak(String);

impl Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Leak {}

/// Fails if a text shows a secret, also one that is divided by a line break.
#[track_caller]
fn assert_no_secret(what: &str, planted: &Planted, text: &str) {
    let joined: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    assert!(!text.contains(SECRET) && !joined.contains(SECRET), "{what} of {planted:?}: {text}");
}

// ===== Events =====

/// The fields of every event and span of this crate on this thread, at every level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl Log {
    fn listen() -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = listen(log.clone());
        (log, guard)
    }

    fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }
}

impl Visit for Log {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        writeln!(self.0.lock().unwrap(), "{}={value:?}", field.name()).unwrap();
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("buttress")
    }

    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        span.record(&mut self.clone());
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        values.record(&mut self.clone());
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

// ===== Types that show text =====

fn debug(shown: impl Debug) -> String {
    format!("{shown:?} {shown:#?}")
}

/// An error and its sources, as `anyhow` and `tracing` show them.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        write!(text, "{error} {error:?} {error:#?}: ").unwrap();
        next = error.source();
    }
    text
}

fn errors(result: Result<impl Sized, ConfigErrors>) -> String {
    result.err().map(|errors| chain(&errors)).unwrap_or_default()
}

fn error(result: Result<impl Sized, ConfigError>) -> String {
    result.err().map(|error| chain(&error)).unwrap_or_default()
}

fn config(planted: &Planted) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.health_probe.uri = Some(planted.uri.clone());
    config.check_health.uri = Some(planted.uri.clone());
    config.deadline.header = Some(planted.uri.clone());
    config
}

/// A call that a misconfigured layer rejects.
async fn misconfigured(planted: &Planted) -> String {
    let wrong = planted.uri.replacen("://", ":/", 1);
    let layer = HealthProbeLayer::get::<Body>(&wrong);
    let mut shown =
        format!("{} {}", debug(&layer), error(HealthProbeLayer::get::<Body>(&wrong).checked()));
    let inner =
        service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(Body::default())) });
    let service = layer.layer(inner);
    shown += &debug(&service);
    if let Err(error) = service.oneshot(Request::new(Body::default())).await {
        shown += &chain(&*error);
        shown += &debug(Rejected::find(&*error));
    }
    let answered = HealthProbeLayer::get::<Body>(&wrong).respond().layer(inner);
    let response = answered.oneshot(Request::new(Body::default())).await.unwrap();
    shown += &debug(response.extensions().get::<Rejected>());
    shown += &debug(response.into_body().collect().await.unwrap().to_bytes());
    shown
}

/// A probe that fails with an error that repeats the request.
async fn probed(planted: &Planted) -> String {
    let leak = planted.error();
    let inner = service_fn(move |_: Request<Body>| {
        let leak = leak.clone();
        async move { Err::<Response<Body>, BoxError>(Box::new(std::io::Error::other(leak))) }
    });
    let health = Health::new();
    let layer = HealthProbeLayer::request(|| {
        let request = Request::get("/healthz").header(header::AUTHORIZATION, "Bearer Pl4nted");
        request.body(Body::default()).unwrap()
    })
    .thresholds(1, 1)
    .report_to(&health, "search");
    let handle = layer.handle();
    let service = layer.layer(inner);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(handle.snapshot().last_error.is_some(), "the probe failed");
    let rejected = service.clone().oneshot(Request::new(Body::default())).await.unwrap_err();
    let mut shown = format!(
        "{}{}{}{}",
        debug(&layer),
        debug(&handle),
        debug(handle.snapshot()),
        debug(&service)
    );
    shown += &chain(&*rejected);
    shown += &pages(&health).await;
    shown
}

/// All texts that a registry shows.
async fn pages(health: &Health) -> String {
    let mut shown = debug(health) + &debug(health.snapshot()) + &debug(health.grpc());
    let (bare, all) = (health.service(), health.service().with_reasons());
    let layer = health.endpoints().with_reasons();
    shown += &(debug(&bare) + &debug(&all) + &debug(&layer));
    for uri in ["/healthz?verbose", "/readyz", "/readyz/search?verbose", "/livez?verbose"] {
        for accept in ["text/plain", "application/health+json"] {
            let ask =
                || Request::get(uri).header(header::ACCEPT, accept).body(Body::default()).unwrap();
            for service in [bare.clone(), all.clone()] {
                let response = service.oneshot(ask()).await.unwrap();
                shown += &debug(response.headers());
                let page = response.into_body().collect().await.unwrap().to_bytes();
                shown += &String::from_utf8_lossy(&page);
            }
        }
    }
    shown
}

async fn reported(planted: &Planted) -> String {
    let health = Health::new();
    let reporter = health.reporter("search").unwrap();
    reporter.fail_because(planted.error().to_string());
    let leak = planted.error();
    health
        .add(
            Check::new("db", move || std::future::ready(Err::<(), _>(leak.clone())))
                .thresholds(1, 1),
        )
        .unwrap();
    let told = planted.error().to_string();
    health
        .add(Check::watch("queue", move || Err::<(), String>(told.clone())).thresholds(1, 1))
        .unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(health.snapshot().iter().all(|check| check.reason.is_some()));
    let by_uri = Check::new(&planted.uri, || std::future::ready(Ok::<(), Leak>(())));
    format!(
        "{}{}{}{}",
        debug(&reporter),
        pages(&health).await,
        error(health.reporter(&planted.uri)),
        error(health.add(by_uri)),
    )
}

/// A retry that gives up: its error shows no secret, and its source is the client's own error.
async fn retried(planted: &Planted) -> String {
    let (leak, seen) = (planted.error(), Arc::new(Mutex::new(String::new())));
    let shows = seen.clone();
    let retry = RetryLayer::http().attempts(2).retry_if(move |attempt| {
        *shows.lock().unwrap() += &debug(attempt);
        Some(true)
    });
    let inner = {
        let leak = leak.clone();
        service_fn(move |_: Request<buttress::retry::ReplayBody<Body>>| {
            let leak = leak.clone();
            async move { Err::<Response<Body>, BoxError>(Box::new(leak)) }
        })
    };
    let mut service =
        ServiceBuilder::new().layer(RespondLayer::new()).layer(retry.clone()).service(inner);
    let mut request =
        Request::get("/").header("x-api-key", "Pl4nted").body(Body::default()).unwrap();
    if let Some(uri) = planted.parsed() {
        *request.uri_mut() = uri;
    }
    let mut shown = debug(&service) + &debug(&retry) + &debug(retry.handle());
    let call = service.ready().await.unwrap().call(request);
    shown += &debug(&call);
    let error = call.await.unwrap_err();
    shown += &format!("{error} {error:?} {error:#?}");
    let gave_up = error.downcast_ref::<RetryError>().expect("the retry gave up");
    assert_eq!(gave_up.source().and_then(|source| source.downcast_ref()), Some(&leak));
    assert!(seen.lock().unwrap().contains("AttemptContext"));
    let seen = seen.lock().unwrap().clone();
    shown + &seen
}

/// Circuits per origin: keys, names and events.
async fn per_origin(planted: &Planted) -> String {
    let Some(uri) = planted.parsed() else { return String::new() };
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).name("search").per_origin();
    let handle = layer.handle();
    let leak = planted.error();
    let service = layer.layer(service_fn(move |_: Request<Body>| {
        let leak = leak.clone();
        async move { Err::<Response<Body>, BoxError>(Box::new(leak)) }
    }));
    let ask = || Request::get(uri.clone()).body(Body::default()).unwrap();
    let _ = service.clone().oneshot(ask()).await;
    let rejected = service.clone().oneshot(ask()).await.unwrap_err();
    assert!(Rejected::find(&*rejected).is_some());
    let origin = Origin::of(&uri);
    format!(
        "{}{}{}{}{}{origin}{}{}",
        debug(&layer),
        debug(&service),
        debug(&handle),
        debug(handle.all()),
        debug(&origin),
        chain(&*rejected),
        debug(handle.all().first().map(|(_, circuit)| circuit.snapshot())),
    )
}

async fn connected(planted: &Planted) -> String {
    let connections = ConnectLayer::new().max_per_host(1);
    let leak = planted.error();
    let connector = service_fn(move |_: http::Uri| {
        let leak = leak.clone();
        async move { Err::<hyper_util::rt::TokioIo<tokio::net::TcpStream>, BoxError>(Box::new(leak)) }
    });
    let service = connections.layer(connector);
    debug(&connections)
        + &debug(&service)
        + &debug(connections.handle())
        + &debug(connections.handle().snapshot())
}

async fn over_reqwest(_: &Planted) -> String {
    let mut headers = HeaderMap::new();
    headers.insert("x-api-key", HeaderValue::from_static("Pl4nted"));
    let client = reqwest::Client::builder().default_headers(headers).no_proxy().build().unwrap();
    let mut client = HttpClient::new(client);
    let request =
        Request::get("http://Pl4nted:Pl4nted@localhost:1/?Pl4nted").header("x-token", "Pl4nted");
    let sent = client.call(request.body(Empty::<Bytes>::new()).unwrap());
    let unsent = client.call(Request::get("/?Pl4nted").body(Empty::<Bytes>::new()).unwrap());
    debug(&client) + &debug(sent) + &debug(unsent)
}

type Row = (&'static str, fn(&Planted) -> std::pin::Pin<Box<dyn Future<Output = String> + '_>>);

macro_rules! table {
    ($($name:literal: |$planted:ident| $shown:expr,)*) => {
        &[$(($name, |$planted| Box::pin(async move { $shown }))),*]
    };
}

/// Each type that shows text, with its name for the message of a failure.
const TABLE: &[Row] = table! {
    "ClientConfig": |planted| debug(config(planted)),
    "ClientConfig::explain": |planted| config(planted).explain(),
    "ClientConfig::check": |planted| errors(config(planted).check()),
    "ClientConfig::changes": |planted| debug(config(planted).changes(&ClientConfig::default())),
    "ClientConfig::source": |planted| debug(config(planted).source("health_probe_uri")),
    "ServerConfig": |planted| {
        let mut config = ServerConfig::preset(ConfigPreset::Internal);
        config.deadline.header = Some(planted.uri.clone());
        debug(&config) + &config.explain() + &errors(config.check()) + &errors(buttress::server(&config).map(|stack| assert_no_secret("ServerStack", planted, &(debug(&stack) + &debug(stack.handle())))))
    },
    "HealthProbeConfig": |planted| {
        let mut config = HealthProbeConfig::off();
        config.uri = Some(planted.uri.clone());
        debug(&config) + &error(config.layer::<Body>())
    },
    "CheckHealthConfig": |planted| {
        let mut config = CheckHealthConfig::default();
        config.uri = Some(planted.uri.clone());
        debug(&config)
    },
    "DeadlineConfig": |planted| {
        let mut config = DeadlineConfig::default();
        config.header = Some(planted.uri.clone());
        debug(&config) + &error(config.layer())
    },
    "Loader": |planted| {
        let json = serde_json::json!({ "health_probe_uri": planted.uri, "retry_attempts": planted.uri, "nothing": "Pl4nted" });
        let loader = ClientConfig::load("search").json(&json.to_string()).env_from([
            ("HTTP_CLIENT_HEALTH_URI", &*planted.uri),
            ("HTTP_CLIENT_RETRY_BACKOFF", &planted.uri),
            ("HTTP_CLIENT_PASSWORD", "Pl4nted"),
            ("SEARCH_HTTP_CLIENT_TOKEN", "Pl4nted"),
            ("PATH", "Pl4nted"),
        ]);
        debug(&loader) + &errors(loader.finish())
    },
    "Loader, a preset and a file": |planted| {
        let json = serde_json::json!({ "preset": planted.uri, "deadline": { "header": [planted.uri] } });
        let loader = ClientConfig::load("").json(&json.to_string()).file(&planted.uri).toml("a = 'Pl4nted");
        let json = serde_json::json!({ "preset": planted.uri });
        debug(&loader) + &errors(loader.finish()) + &errors(ClientConfig::from_json(&json.to_string()))
    },
    "a group by serde": |planted| {
        let json = serde_json::json!({ "attempts": planted.uri });
        let error = serde_json::from_value::<RetryConfig>(json).unwrap_err();
        format!("{error} {error:?}")
    },
    "ClientStack": |planted| {
        let mut shown = errors(ClientStack::new(&config(planted)));
        let mut config = config(planted);
        config.deadline.header = None;
        match ClientStack::new(&config) {
            Ok(stack) => shown += &(debug(&stack) + &debug(stack.handle()) + &debug(stack.handle().config())),
            Err(errors) => shown += &chain(&errors),
        }
        match buttress::client::<Body>(&config) {
            Ok(client) => {
                let handle = client.handle();
                shown += &(debug(&client) + &debug(&handle) + &debug(handle.probe()) + &debug(handle.snapshot()));
                shown += &debug(client.check_health().await);
            }
            Err(errors) => shown += &chain(&errors),
        }
        shown
    },
    "a probe's layer": |planted| {
        let get = HealthProbeLayer::get::<Body>(&planted.uri);
        let grpc = HealthProbeLayer::grpc(&planted.uri, "search.Search", Body::new);
        debug(&get) + &debug(&grpc) + &debug(get.handle()) + &error(get.checked()) + &error(grpc.checked())
    },
    "a header's name": |planted| {
        let layer = DeadlineLayer::new().header(&planted.uri);
        debug(&layer) + &error(layer.checked())
    },
    "exempt paths": |planted| {
        let layer = buttress::ConcurrencyLimitLayer::new(1).exempt_paths([planted.uri.clone()]);
        debug(&layer) + &error(layer.checked())
    },
    "a misconfigured layer": |planted| misconfigured(planted).await,
    "a failed probe": |planted| probed(planted).await,
    "failed checks": |planted| reported(planted).await,
    "RetryError and Seen": |planted| retried(planted).await,
    "circuits per origin": |planted| per_origin(planted).await,
    "connectors": |planted| connected(planted).await,
    "HttpClient": |planted| over_reqwest(planted).await,
};

/// Every row and every event, on a paused clock.
fn shows_no_secret(planted: &Planted) {
    let (log, _guard) = Log::listen();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        for (name, shown) in TABLE {
            assert_no_secret(name, planted, &shown(planted).await);
            assert_no_secret(&format!("events of {name}"), planted, &log.text());
        }
    });
    assert!(log.text().contains("health probe down"), "{}", log.text());
}

#[test]
fn no_secret_of_a_plain_uri_is_shown() {
    shows_no_secret(&Planted::plain());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 10))]

    #[test]
    fn no_secret_is_shown_anywhere(planted in planted()) {
        shows_no_secret(&planted);
    }
}

#[test]
fn text_without_secrets_stays_readable() {
    let planted = Planted::plain();
    let shown = config(&planted).explain();
    assert!(shown.contains("http://***@search:8080/healthz?***"), "{shown}");
    let shown = debug(HealthProbeLayer::get::<Body>(&planted.uri).checked());
    assert!(!shown.contains("fault: Some"), "{shown}");
    let wrong = ClientConfig::load("")
        .env_from([("HTTP_CLIENT_RETRY_ATTEMPTS", "many")])
        .finish()
        .unwrap_err();
    assert_eq!(
        wrong.to_string(),
        "`retry_attempts` is many: use a whole number, 0 or more (env HTTP_CLIENT_RETRY_ATTEMPTS)"
    );
    let loader = ClientConfig::load("search").env_from([("HTTP_CLIENT_PASSWORD", "Pl4nted")]);
    assert!(debug(&loader).contains("HTTP_CLIENT_PASSWORD"), "{loader:?}");
    // A configuration that is written out can be read again.
    let json = serde_json::to_string(&config(&planted)).unwrap();
    assert!(json.contains(&planted.uri));
}

// ===== Over reqwest =====

#[tokio::test]
async fn warning_of_a_failed_probe_over_reqwest_shows_no_secret() {
    let (log, _guard) = Log::listen();
    let nobody = net::closed_address().await;
    let uri = format!("http://Pl4ntedUser:Pl4ntedPassword@{nobody}/healthz?key=Pl4ntedKey");
    let client = HttpClient::new(reqwest::Client::builder().no_proxy().build().unwrap());
    let health = Health::new();
    let layer: HealthProbeLayer<Get<Empty<Bytes>>> = HealthProbeLayer::get(&uri).thresholds(1, 1);
    let layer = layer.report_to(&health, "search");
    let handle = layer.handle();
    let service = layer.layer(client);
    tokio::time::timeout(Duration::from_secs(20), handle.changed()).await.unwrap();
    let told = handle.snapshot().last_error.unwrap();
    assert!(told.contains("for url (http://"), "{told}");
    assert!(
        told.contains(&format!("***@{nobody}/healthz?***"))
            || told.contains(&format!("{nobody}/healthz?***")),
        "{told}"
    );
    let planted = Planted::new(&uri);
    assert_no_secret("snapshot", &planted, &debug(handle.snapshot()));
    assert_no_secret("pages", &planted, &pages(&health).await);
    assert!(log.text().contains("health probe down"));
    assert_no_secret("events", &planted, &log.text());
    drop(service);
}

// ===== Bounds =====

/// The maximum that the documentation of `ConfigError` states.
const MAX_CONFIG_ERROR: usize = 1536;

#[track_caller]
fn assert_short(shown: &ConfigErrors) {
    for error in shown.iter() {
        assert!(error.to_string().len() <= MAX_CONFIG_ERROR, "{} bytes", error.to_string().len());
        assert!(error.value.len() <= 256);
    }
    assert!(shown.to_string().len() <= 66 * (MAX_CONFIG_ERROR + 1));
}

#[test]
fn error_of_a_value_of_ten_mebibytes_is_short() {
    for unit in ["a", "\n", "http://user:Pl4nted@", "//", "\u{1F600}"] {
        let huge = unit.repeat((10 << 20) / unit.len());
        let began = tokio::time::Instant::now();
        let text = ClientConfig::load("").env_from([
            ("HTTP_CLIENT_RETRY_ATTEMPTS", &*huge),
            ("HTTP_CLIENT_RETRY_BACKOFF", &huge),
            ("HTTP_CLIENT_STREAMING", &huge),
            ("HTTP_CLIENT_PRESET", &huge),
        ]);
        assert!(debug(&text).len() < 4096);
        let errors = text.finish().map(drop).unwrap_err();
        assert_eq!(errors.iter().count(), 4);
        assert_short(&errors);
        let json = serde_json::json!({ "health_probe_uri": huge, "check_health_uri": huge, "deadline_header": huge });
        let config = ClientConfig::from_json(&json.to_string()).unwrap();
        assert!(config.explain().len() < 20_000);
        assert!(format!("{config:?}").len() < 10_000);
        assert_short(&config.check().unwrap_err());
        let json = serde_json::json!({ (huge.clone()): 1 });
        assert_short(&ClientConfig::from_json(&json.to_string()).map(drop).unwrap_err());
        let health = Health::new();
        assert!(error(health.reporter(&huge)).len() < 4 * MAX_CONFIG_ERROR);
        let reporter = health.reporter("db").unwrap();
        reporter.fail_because(huge.clone());
        assert!(health.snapshot()[0].reason.as_ref().is_none_or(|reason| reason.len() <= 256));
        // Far above the time of a linear algorithm, and far below the time of any other.
        assert!(began.elapsed() < Duration::from_secs(60), "{unit:?}: {:?}", began.elapsed());
    }
}

#[test]
fn errors_of_many_settings_are_counted() {
    let keys = (0..1000).map(|n| (format!("HTTP_CLIENT_UNKNOWN_{n}"), "Pl4nted"));
    let errors = ClientConfig::load("").env_from(keys).finish().map(drop).unwrap_err();
    assert_eq!(errors.iter().count(), 1000);
    let shown = errors.to_string();
    assert!(shown.ends_with("\nand 936 more") && shown.lines().count() == 65, "{shown}");
    assert!(!shown.contains(SECRET));
}

proptest! {
    #[test]
    fn error_of_any_value_is_short(unit in ".{1,40}", length in 0usize..200_000) {
        let value = unit.repeat(length / unit.len());
        let json = serde_json::json!({ "retry_attempts": value, "breaker_window": value, (value.clone()): true });
        if let Err(errors) = ClientConfig::from_json(&json.to_string()) {
            assert_short(&errors);
        }
        if let Err(error) = DeadlineLayer::new().header(&value).checked() {
            prop_assert!(error.to_string().len() <= MAX_CONFIG_ERROR);
        }
        if let Err(error) = HealthProbeLayer::get::<Body>(&value).checked() {
            prop_assert!(error.to_string().len() <= MAX_CONFIG_ERROR);
        }
    }
}

// ===== Pages without reasons =====

#[tokio::test(start_paused = true)]
async fn page_without_reasons_shows_no_reasons_times_or_durations() {
    let health = Health::new();
    let slow = || async {
        tokio::time::sleep(Duration::from_millis(12)).await;
        Err::<(), _>("no route to 10.0.0.7")
    };
    health.add(Check::new("db", slow).thresholds(1, 1)).unwrap();
    health.reporter("search").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let service = health.service();
    for uri in ["/readyz?verbose", "/healthz", "/readyz/db?verbose", "/livez?verbose"] {
        for accept in ["text/plain", "application/health+json", "application/json"] {
            let request =
                Request::get(uri).header(header::ACCEPT, accept).body(Body::default()).unwrap();
            let response = service.clone().oneshot(request).await.unwrap();
            let page = response.into_body().collect().await.unwrap().to_bytes();
            let page = String::from_utf8(page.to_vec()).unwrap();
            for shown in ["10.0.0.7", "last_check", "response_time", "ago", "12", "20"] {
                assert!(!page.contains(shown), "{uri} {accept}: {page}");
            }
        }
    }
    let request = Request::get("/readyz")
        .header(header::ACCEPT, "application/json")
        .body(Body::default())
        .unwrap();
    let response = health.service().with_reasons().oneshot(request).await.unwrap();
    let page = response.into_body().collect().await.unwrap().to_bytes();
    let page: serde_json::Value = serde_json::from_slice(&page).unwrap();
    let db = &page["checks"]["db"][0];
    assert_eq!(db["output"], "no route to 10.0.0.7");
    assert!(db["last_check"].is_string() && db["response_time_ms"].is_number());
}
