//! Whole stacks from a configuration: their behaviour, their snapshots, and settings that change at run time.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, body::Body, routing::get};
use buttress::{
    BoxError, Deadline, DeadlineSource, Rejected,
    breaker::CircuitState,
    config::{ClientConfig, ConfigPreset, ServerConfig},
    outcome::RejectedKind,
    stack::{ClientStack, UpstreamHealth},
    timeout::TimeoutPhase,
};
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::secs;

type Nothing = Empty<bytes::Bytes>;

fn request() -> Request<Nothing> {
    Request::new(Nothing::new())
}

/// The next responses of the service: a status after a time. After the last one it responds 200 at once.
type Script = Arc<Mutex<VecDeque<(u16, Duration)>>>;

fn client<B: 'static>(
    stack: &ClientStack,
    script: &Script,
) -> impl Service<
    Request<Nothing>,
    Response = Response<impl http_body::Body<Data = bytes::Bytes, Error = BoxError>>,
    Error = BoxError,
    Future: Send,
> + Clone
where
    Request<B>: Send,
{
    let script = script.clone();
    stack.layer(service_fn(move |_| {
        let (status, time) = script.lock().unwrap().pop_front().unwrap_or((200, Duration::ZERO));
        async move {
            if time > Duration::ZERO {
                sleep(time).await;
            }
            let response = Response::builder().status(status).body(Full::from("hello"));
            Ok::<_, Infallible>(response.unwrap())
        }
    }))
}

/// A client of short calls with one long call: its deadline is neither the default nor bounded by the maximum.
#[tokio::test(start_paused = true)]
async fn deadline_of_the_application_replaces_the_default_and_the_maximum_of_a_client_stack() {
    for preset in [ConfigPreset::Internal, ConfigPreset::Slow] {
        let toml = "deadline_default = '10s'\ndeadline_max = '20s'\ntimeout_head = 'off'\n\
                    deadline_header = 'x-request-timeout-ms'\nlimit_queue_wait = '1s'\nconnect_queue_wait = '1s'";
        let config = ClientConfig::load("search").preset(preset).toml(toml).finish().unwrap();
        let (stack, script) = (ClientStack::new(&config).unwrap(), Script::default());
        let client = client::<()>(&stack, &script);
        let call = |deadline: Option<Deadline>, time| {
            script.lock().unwrap().push_back((200, time));
            let mut request = request();
            if let Some(deadline) = deadline {
                request.extensions_mut().insert(deadline);
            }
            client.clone().oneshot(request)
        };
        let own = || Some(Deadline::after(secs(60)));
        let by_caller = || own().map(|own| own.with_source(DeadlineSource::Caller));
        assert!(call(own(), secs(59)).await.is_ok(), "{preset}");
        let cases: [(&dyn Fn() -> Option<Deadline>, u64); 3] =
            [(&own, 60), (&|| None, 10), (&by_caller, 10)];
        for (deadline, after) in cases {
            let deadline = deadline();
            let started = Instant::now();
            let error = call(deadline, secs(61)).await.map(drop).unwrap_err();
            let kind = Rejected::find(&*error).map(Rejected::kind);
            assert_eq!(
                kind,
                Some(RejectedKind::TimedOut(TimeoutPhase::Deadline)),
                "{preset} {deadline:?}"
            );
            assert_eq!(started.elapsed(), secs(after), "{preset} {deadline:?}");
        }
        assert_eq!(stack.handle().snapshot().timeouts, 3, "{preset}");
    }
}

/// Both deadline layers of a stack write and read the header.
#[tokio::test(start_paused = true)]
async fn default_deadline_of_a_client_stack_with_a_header_is_a_failure() {
    let toml = "deadline_default = '500ms'\ndeadline_header = 'x-request-timeout-ms'\nretry_attempts = 1\n\
                limit_queue = 0\nconnect_queue = 0";
    let stack = ClientStack::new(&ClientConfig::from_toml(toml).unwrap()).unwrap();
    let script = Script::default();
    let client = client::<()>(&stack, &script);
    script.lock().unwrap().extend([(200, secs(60)); 5]);
    for _ in 0..5 {
        client.clone().oneshot(request()).await.map(drop).unwrap_err();
    }
    let seen = stack.handle().snapshot();
    assert_eq!((seen.failures, seen.cancelled, seen.timeouts), (5, 0, 5));
    assert_eq!(seen.breaker, Some(CircuitState::Open));
}

#[tokio::test(start_paused = true)]
async fn response_total_is_a_setting_that_is_explained_and_can_change_while_the_stack_runs() {
    let mut config =
        ClientConfig::from_toml("timeout_response_total = '7s'\nretry_attempts = 1").unwrap();
    let explained = config.explain().to_string();
    let line = explained.lines().find(|line| line.contains("timeout_response_total")).unwrap();
    assert!(line.contains("7s") && line.contains("when the request has been sent"), "{line}");
    let (stack, script) = (ClientStack::new(&config).unwrap(), Script::default());
    let client = client::<()>(&stack, &script);
    for after in [7, 9] {
        config.timeout.response_total = Some(secs(after));
        assert!(stack.handle().update(&config).unwrap().is_empty());
        script.lock().unwrap().push_back((200, secs(20)));
        let started = Instant::now();
        let error = client.clone().oneshot(request()).await.map(drop).unwrap_err();
        let kind = Rejected::find(&*error).map(Rejected::kind);
        assert_eq!(kind, Some(RejectedKind::TimedOut(TimeoutPhase::ResponseTotal)));
        assert_eq!(started.elapsed(), secs(after));
    }
    assert_eq!((stack.handle().snapshot().timeouts, stack.handle().snapshot().failures), (2, 2));
}

#[tokio::test(start_paused = true)]
async fn a_client_stack_counts_the_outcomes_of_its_calls() {
    let config = ClientConfig::load("search")
        .toml("breaker_failures = 3\nbreaker_open_for = '5s'\ntimeout_head = '6s'\nretry_backoff = '1ms'")
        .finish()
        .unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let (handle, script) = (stack.handle(), Script::default());
    let client = client::<()>(&stack, &script);
    let fresh = handle.snapshot();
    assert_eq!((fresh.total, fresh.average, fresh.p99, fresh.healthy), (0, None, None, true));

    // A successful call of 100 ms, whose body is read to its end.
    script.lock().unwrap().push_back((200, Duration::from_millis(100)));
    let response = client.clone().oneshot(request()).await.unwrap();
    assert_eq!((handle.snapshot().in_flight, handle.snapshot().successes), (1, 0));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    let seen = handle.snapshot();
    assert_eq!((seen.in_flight, seen.successes), (0, 1));
    assert_eq!(seen.average, Some(Duration::from_millis(100)));
    let p99 = seen.p99.unwrap();
    assert!(p99 > Duration::from_millis(98) && p99 < Duration::from_millis(102), "{p99:?}");

    // A call that is retried.
    script.lock().unwrap().push_back((503, Duration::ZERO));
    drop(client.clone().oneshot(request()).await.unwrap());
    let seen = handle.snapshot();
    assert_eq!((seen.retries, seen.successes, seen.failures), (1, 2, 0));

    // A call that hangs in all its attempts: the circuit opens, and the snapshot reports it.
    script.lock().unwrap().extend([(200, secs(60)); 3]);
    let error = client.clone().oneshot(request()).await.map(drop).unwrap_err();
    assert!(
        matches!(Rejected::find(&*error).unwrap().kind(), RejectedKind::TimedOut(_)),
        "{error}"
    );
    let seen = handle.snapshot();
    assert_eq!((seen.timeouts, seen.failures, seen.retries), (3, 1, 3));
    assert_eq!(
        (seen.breaker, seen.breaker_opened, seen.healthy),
        (Some(CircuitState::Open), 1, false)
    );
    let error = client.clone().oneshot(request()).await.map(drop).unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().name(), Some("search"));
    assert_eq!((handle.snapshot().rejected, handle.snapshot().total), (1, 4));
    assert_eq!(
        handle.snapshot().average,
        seen.average,
        "a rejection is not a sample of the latency"
    );

    // The check reports the open circuit, whatever the response. It succeeds after the open time.
    let check = handle.check_health(async { Ok::<_, BoxError>(Response::new(())) }).await;
    assert_eq!(check.status, UpstreamHealth::Unhealthy);
    sleep(secs(5)).await;
    let check = handle.check_health(client.clone().oneshot(request())).await;
    assert_eq!(
        (check.status, handle.snapshot().last_check),
        (UpstreamHealth::Healthy, Some(check))
    );
    script.lock().unwrap().push_back((404, secs(2)));
    let check = handle.check_health(client.clone().oneshot(request())).await;
    assert_eq!((check.status, check.took), (UpstreamHealth::Unhealthy, secs(2)));

    // A call that its caller cancels.
    script.lock().unwrap().push_back((200, secs(60)));
    assert!(tokio::time::timeout(secs(1), client.oneshot(request())).await.is_err());
    assert_eq!((handle.snapshot().cancelled, handle.snapshot().in_flight), (1, 0));
}

/// The behaviour of the service and of the caller in one call.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Answered(u16),
    Fails,
    Panics,
    Hangs,
    GivenUp,
    BodyDropped,
    Late,
}

#[tokio::test(start_paused = true)]
async fn counts_of_all_outcomes_add_up() {
    use Fate::*;
    const FATES: [Fate; 10] = [
        Answered(200),
        Answered(404),
        Answered(429),
        Answered(503),
        Fails,
        Panics,
        Hangs,
        GivenUp,
        BodyDropped,
        Late,
    ];
    let settings = "limit_max = 20\nlimit_queue = 20\nlimit_queue_wait = '2s'\nbreaker_open_for = '3s'\n\
                    timeout_head = '5s'\nretry_attempts = 2";
    let stack = ClientStack::new(&ClientConfig::from_toml(settings).unwrap()).unwrap();
    let handle = stack.handle();
    let client = stack.layer(service_fn(|request: Request<_>| async move {
        sleep(Duration::from_millis(20)).await;
        match request.extensions().get::<Fate>().copied().unwrap() {
            Answered(status) => Ok(Response::builder()
                .status(status)
                .body(Full::<bytes::Bytes>::from("hello"))
                .unwrap()),
            Fails => Err(std::io::Error::other("no")),
            Panics => panic!("no"),
            Hangs | GivenUp => std::future::pending().await,
            BodyDropped | Late => Ok(Response::new(Full::from("hello"))),
        }
    }));
    let mut tasks = tokio::task::JoinSet::new();
    for nth in 0..500 {
        let fate = FATES[nth * 7 % FATES.len()];
        let (client, mut request) = (client.clone(), request());
        request.extensions_mut().insert(fate);
        if let Late = fate {
            request.extensions_mut().insert(buttress::Deadline::after(Duration::ZERO));
        }
        tasks.spawn(async move {
            sleep(Duration::from_millis(nth as u64 * 37)).await;
            let call = client.oneshot(request);
            match fate {
                GivenUp => drop(tokio::time::timeout(secs(1), call).await.map(drop)),
                BodyDropped => drop(call.await.map(|mut response| {
                    drop(tokio_test::task::spawn(response.body_mut().frame()).poll());
                })),
                _ => drop(call.await.map(|response| response.into_body().collect())),
            }
        });
    }
    while tasks.join_next().await.is_some() {
        let seen = handle.snapshot();
        let ended =
            seen.successes + seen.failures + seen.throttled + seen.cancelled + seen.rejected;
        assert_eq!(seen.total, ended + seen.in_flight, "{seen:?}");
    }
    let seen = handle.snapshot();
    assert_eq!((seen.total, seen.in_flight, seen.waiting), (500, 0, 0), "{seen:?}");
    let each = [seen.successes, seen.failures, seen.throttled, seen.cancelled, seen.rejected];
    assert!(each.iter().all(|count| *count > 0), "each outcome occurs: {seen:?}");
    assert!(seen.timeouts > 0 && seen.breaker_opened > 0 && seen.retries > 0, "{seen:?}");
}

/// Inner layers enforce the deadline in every phase of a call: at the service, in the body, in the queue and before its
/// start. The error and the counters state the phase.
#[tokio::test(start_paused = true)]
async fn a_deadline_is_enforced_in_every_phase_of_a_call() {
    let off = "timeout_head = 'off'\ntimeout_request_idle = 'off'\ntimeout_request_stall = 'off'\n\
               timeout_first_frame = 'off'\ntimeout_response_idle = 'off'\nlimit_max = 1\ndeadline_default = '6s'";
    for attempts in [1, 3] {
        let config = format!("{off}\nretry_attempts = {attempts}");
        let stack = ClientStack::new(&ClientConfig::from_toml(&config).unwrap()).unwrap();
        let handle = stack.handle();
        let client = stack.layer(service_fn(async |request: Request<_>| {
            if request.uri().path() == "/hangs" {
                std::future::pending::<()>().await;
            }
            let silent = futures_util::stream::pending::<Result<&str, BoxError>>();
            Ok::<_, BoxError>(Response::new(Body::from_stream(silent)))
        }));
        let call = |path: &str, time: Duration| {
            let (mut request, client) = (request(), client.clone());
            *request.uri_mut() = path.parse().unwrap();
            request.extensions_mut().insert(Deadline::after(time));
            async move {
                let start = Instant::now();
                let end = match client.oneshot(request).await {
                    Ok(response) => response.into_body().collect().await.map(drop),
                    Err(error) => Err(error),
                };
                (Rejected::find(&*end.unwrap_err()).unwrap().kind(), start.elapsed())
            }
        };
        let under_way = RejectedKind::TimedOut(TimeoutPhase::Deadline);
        assert_eq!(
            call("/hangs", secs(9)).await,
            (under_way, secs(9)),
            "the deadline replaces the default"
        );
        assert_eq!(call("/silent", secs(1)).await, (under_way, secs(1)), "in the response body");
        let seen = handle.snapshot();
        assert_eq!((seen.timeouts, seen.failures, seen.rejected), (2, 2, 0));
        let (first, second) = tokio::join!(call("/hangs", secs(2)), call("/hangs", secs(1)));
        assert_eq!(first, (under_way, secs(2)));
        assert_eq!(second, (RejectedKind::DeadlinePassed, secs(1)), "in the queue");
        assert_eq!(call("/", secs(0)).await, (RejectedKind::DeadlinePassed, secs(0)));
        let seen = handle.snapshot();
        assert_eq!((seen.timeouts, seen.failures, seen.rejected), (3, 3, 2), "{attempts}");
        assert_eq!((seen.in_flight, seen.retries, seen.cancelled), (0, 0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn update_changes_live_settings_and_returns_the_others() {
    let base = "retry_attempts = 1\ndeadline_default = '50s'\nlimit_max = 1\nlimit_queue = 0";
    let config = ClientConfig::from_toml(base).unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let (handle, script) = (stack.handle(), Script::default());
    let client = client::<()>(&stack, &script);
    let slow = || script.lock().unwrap().push_back((200, secs(60)));
    let took = async |expected: u64| {
        slow();
        let start = Instant::now();
        assert!(client.clone().oneshot(request()).await.is_err());
        assert_eq!(start.elapsed(), secs(expected));
    };
    took(30).await;
    let fixed = handle.update(&ClientConfig::from_toml("timeout_head = '7s'").unwrap()).unwrap();
    assert_eq!(fixed, Vec::<&str>::new());
    script.lock().unwrap().extend([(503, Duration::ZERO); 2]);
    drop(client.clone().oneshot(request()).await.unwrap());
    assert_eq!(handle.snapshot().retries, 2, "the update allows three attempts");
    assert_eq!(handle.config().limit.max, Some(256));

    // The deadline and the limit change. Settings that need a new stack do not, and the update returns their keys.
    let other = "deadline_default = '5s'\nretry_attempts = 1\nbreaker_failure_ratio = 0.5\n\
                 deadline_header = 'x-left'\nretry_budget_ratio = 0.5\nbreaker_failures = 9\nlimit_queue_wait = '1s'";
    let fixed = handle.update(&ClientConfig::from_toml(other).unwrap()).unwrap();
    assert_eq!(
        fixed,
        ["deadline_header", "retry_budget_ratio", "breaker_failures", "breaker_failure_ratio"]
    );
    let now = handle.config();
    assert_eq!(
        (now.deadline.header, now.breaker.failures),
        (None, Some(5)),
        "the settings in force"
    );
    took(5).await;
    // All settings of the deadline change, except the header.
    let kept = "deadline_default = '50s'\ndeadline_max = '9s'\ndeadline_reserve = '2s'\nretry_attempts = 1";
    assert!(
        !handle
            .update(&ClientConfig::from_toml(kept).unwrap())
            .unwrap()
            .iter()
            .any(|key| key.starts_with("deadline"))
    );
    took(7).await;
    let each = "retry_attempts = 2\nretry_attempt_timeout = '6s'\nretry_backoff = '0s'";
    handle.update(&ClientConfig::from_toml(each).unwrap()).unwrap();
    slow();
    took(12).await;
    handle.update(&ClientConfig::from_toml("retry_attempts = 1").unwrap()).unwrap();
    took(30).await;
    let fixed = handle.update(&ClientConfig::from_toml("breaker_failures = 6").unwrap()).unwrap();
    assert!(!fixed.contains(&"breaker_failures"), "the same rule with another number: {fixed:?}");
    let next =
        ClientConfig::load("other").toml("breaker_window = '1m'\nlimit_max = 9").finish().unwrap();
    assert_eq!(handle.update(&next).unwrap(), ["breaker_window"]);
    let now = handle.config();
    assert_eq!((&*now.name, now.limit.max, now.breaker.window), ("", Some(9), secs(10)));
    let origin = |key| now.source(key).unwrap().to_string();
    assert_eq!(
        (origin("limit_max"), origin("breaker_window")),
        ("file TOML".into(), "default".into())
    );

    // An invalid update changes nothing.
    let bad = ClientConfig::from_toml("retry_attempts = 9").unwrap();
    assert!(handle.update(&bad).unwrap_err().to_string().contains("use at most 5 attempts"));
    assert_eq!(handle.config().retry.attempts, 3);
    assert!(ClientStack::new(&bad).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_slow_call_is_hedged_only_with_a_delay_or_a_percentile() {
    let told = ["hedge_after = '80ms'", "hedge_percentile = 0.9", "hedge_budget_ratio = 0.5"];
    for (toml, slow, hedges) in [(told[0], 80, 1), (told[1], 1, 1), (told[2], 9000, 0)] {
        let config = ClientConfig::from_toml(toml).unwrap();
        let stack = ClientStack::new(&config).unwrap();
        let script = Script::default();
        let client = client::<()>(&stack, &script);
        // The percentile needs some samples.
        for _ in 0..50 {
            client.clone().oneshot(request()).await.unwrap();
        }
        script.lock().unwrap().push_back((200, secs(9)));
        let start = Instant::now();
        assert_eq!(client.clone().oneshot(request()).await.unwrap().status(), 200);
        assert_eq!(
            (start.elapsed().as_millis(), stack.handle().snapshot().hedges),
            (slow, hedges),
            "{toml}"
        );
        assert_eq!(stack.handle().snapshot().total, 51, "hedge attempts are not counted as calls");
        // A call that is not safe to repeat has no hedge.
        script.lock().unwrap().push_back((200, secs(9)));
        let mut post = request();
        *post.method_mut() = http::Method::POST;
        client.clone().oneshot(post).await.unwrap();
        assert_eq!(stack.handle().snapshot().hedges, hedges);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stack_with_every_layer_off_forwards_every_call() {
    let off = [
        "deadline_default",
        "breaker_failures",
        "limit_max",
        "timeout_head",
        "timeout_first_frame",
        "timeout_response_idle",
        "timeout_request_idle",
        "timeout_request_stall",
    ]
    .map(|key| format!("{key} = 'off'\n"))
    .concat();
    let config = ClientConfig::from_toml(&(off + "retry_attempts = 1")).unwrap();
    let stack = ClientStack::new(&config).unwrap();
    let script = Script::default();
    let client = client::<()>(&stack, &script);
    for status in [503; 9] {
        script.lock().unwrap().push_back((status, secs(3600)));
        assert_eq!(client.clone().oneshot(request()).await.unwrap().status(), status);
    }
    assert!(stack.handle().snapshot().healthy);
    assert_eq!(stack.handle().breaker().state(), CircuitState::ForcedClosed);
}

#[tokio::test(start_paused = true)]
async fn a_server_stack_waits_for_uploads_but_not_for_hung_handlers() {
    let stack = buttress::server(&ServerConfig::default()).unwrap();
    let handle = stack.handle();
    let app: Router = Router::new()
        .route("/reads", axum::routing::put(|body: String| async { body }))
        .route("/hangs", axum::routing::put(std::future::pending::<()>))
        .route(
            "/holds",
            axum::routing::put(|request: Request<Body>| async {
                std::future::pending::<()>().await;
                drop(request);
            }),
        )
        .layer(stack);
    // Four seconds between frames, longer than a handler may take, and 250 bytes per second.
    let upload = || {
        let frames = futures_util::stream::unfold(0, |nth| async move {
            sleep(secs(4)).await;
            (nth < 10).then_some((Ok::<_, Infallible>([b'x'; 1000].as_slice()), nth + 1))
        });
        Body::from_stream(frames)
    };
    for (path, status, after) in [("/reads", 200, 44), ("/hangs", 503, 30), ("/holds", 503, 30)] {
        let start = Instant::now();
        let request = Request::put(path).body(upload()).unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        assert_eq!((response.status().as_u16(), start.elapsed()), (status, secs(after)), "{path}");
    }
    assert_eq!((handle.snapshot().timeouts, handle.snapshot().in_flight), (2, 0));
}

#[tokio::test(start_paused = true)]
async fn a_server_stack_works_under_axum() {
    let config = "limit_max = 1\nlimit_queue = 0\ntimeout_head = '3s'\ndeadline_header = 'x-left'";
    let stack = buttress::server(&ServerConfig::from_toml(config).unwrap()).unwrap();
    let handle = stack.handle();
    let app: Router = Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/late", get(|| async { sleep(secs(9)).await }))
        .layer(stack);
    let send = |path: &str, left: &str| {
        let request = Request::get(path).header("x-left", left).body(Body::empty()).unwrap();
        tokio::spawn(app.clone().oneshot(request))
    };
    let response: Result<_, Infallible> = send("/", "9000").await.unwrap();
    assert_eq!(response.unwrap().into_body().collect().await.unwrap().to_bytes(), "hello");
    assert_eq!(
        send("/late", "2000").await.unwrap().unwrap().status(),
        504,
        "the deadline of the caller"
    );
    let late = send("/late", "9000");
    sleep(secs(1)).await;
    assert_eq!(send("/", "9000").await.unwrap().unwrap().status(), 503, "full");
    assert_eq!(late.await.unwrap().unwrap().status(), 503, "too slow");
    let seen = handle.snapshot();
    assert_eq!((seen.total, seen.successes, seen.rejected, seen.timeouts), (4, 1, 1, 2));
    assert_eq!((seen.in_flight, seen.breaker), (0, None));
    let fixed = handle.update(&ServerConfig::from_toml("timeout_head = '20s'").unwrap()).unwrap();
    assert_eq!(fixed, ["deadline_header"]);
    assert_eq!(send("/late", "60000").await.unwrap().unwrap().status(), 200);
    assert_eq!(handle.config().deadline.header.as_deref(), Some("x-left"));
}

#[tokio::test(start_paused = true)]
async fn a_server_reports_a_passed_deadline_alike_in_every_layer() {
    let config = "limit_max = 1\ndeadline_header = 'x-left'";
    let stack = buttress::server(&ServerConfig::from_toml(config).unwrap()).unwrap();
    let handle = stack.handle();
    let app: Router =
        Router::new().route("/", axum::routing::any(std::future::pending::<()>)).layer(stack);
    let left = |ms: &str| Request::post("/").header("x-left", ms).body(Body::empty()).unwrap();
    let grpc = |left: &str| {
        let head = Request::post("/").header("content-type", "application/grpc");
        head.header("grpc-timeout", left).body(Body::empty()).unwrap()
    };
    let told = async |request: Request<Body>| {
        let start = Instant::now();
        let response: Response<Body> = app.clone().oneshot(request).await.unwrap();
        let status = response.headers().get("grpc-status").map(|it| it.to_str().unwrap().into());
        (response.status().as_u16(), status, start.elapsed())
    };
    let deadline_exceeded = Some(String::from("4"));
    for (request, late, status, after) in [
        // In flight; in the queue; before its start.
        (left("2000"), left("1000"), (504, None), 1),
        (grpc("2S"), grpc("1S"), (200, deadline_exceeded.clone()), 1),
        (left("2000"), left("0"), (504, None), 0),
        (grpc("2S"), grpc("0S"), (200, deadline_exceeded), 0),
    ] {
        let (first, second) = tokio::join!(told(request), told(late));
        let (http, grpc) = status;
        assert_eq!((first, second), ((http, grpc.clone(), secs(2)), (http, grpc, secs(after))));
    }
    let seen = handle.snapshot();
    assert_eq!((seen.total, seen.timeouts, seen.rejected, seen.in_flight), (8, 4, 4, 0));
}
