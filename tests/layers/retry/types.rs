//! Bounds and inference of the types, and services that are not HTTP.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Retry,
    RetryBudget, RetryLayer,
    retry::{GiveUpReason, PeekedBody, Replay, ReplayBody, RetryFuture, RetryHandle},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{Empty, Full};
use tokio::{task::yield_now, time::Instant};
use tokio_test::{assert_ready, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneSyncService};

use super::fixtures::*;

#[test]
fn auto_traits() {
    fn service<T: Clone + Send + Sync + 'static>() {}
    fn send<T: Send + 'static>() {}
    fn unpin<T: Unpin>() {}
    service::<RetryLayer>();
    service::<RetryHandle>();
    service::<RetryBudget>();
    service::<Retry<Inner>>();
    type Future = <Retry<Inner> as Service<Request<ScriptBody>>>::Future;
    send::<Future>();
    // A client for bodies that are `Send`, but neither `Sync` nor `Unpin`.
    type Client = hyper_util::client::legacy::Client<
        hyper_util::client::legacy::connect::HttpConnector,
        ReplayBody<OnlySend>,
    >;
    service::<Retry<Client>>();
    send::<<Retry<Client> as Service<Request<OnlySend>>>::Future>();
    send::<ReplayBody<OnlySend>>();
    send::<PeekedBody<hyper::body::Incoming>>();
    unpin::<PeekedBody<hyper::body::Incoming>>();
    fn _named<S, F, P, C>(_: RetryFuture<S, F, P, C>) {}
}

type OnlySend = http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>;

#[tokio::test(start_paused = true)]
async fn works_inside_tokio_spawn() {
    // Over an inner service that mentions `BoxError`, a case in which type inference can fail.
    let boxed = BoxCloneSyncService::new(service_fn(|_: Request<ReplayBody<Full<Bytes>>>| async {
        Err::<Response<Full<Bytes>>, BoxError>(Oops("boxed").into())
    }));
    let mut service = RetryLayer::http().layer(boxed);
    let result =
        tokio::spawn(
            async move { service.ready().await?.call(Request::new(Full::from("x"))).await },
        );
    assert_eq!(told(&result.await.unwrap()).made, 1);

    fn failed(result: Result<&u32, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let boxed = BoxCloneSyncService::new(service_fn(|n: u32| async move {
        if n == 0 { Err::<u32, BoxError>(Oops("zero").into()) } else { Ok(n) }
    }));
    let mut service = RetryLayer::new().classify(failed).layer(boxed);
    let result = tokio::spawn(async move { service.ready().await?.call(0).await });
    assert!(result.await.unwrap().is_err());
}

/// The client stack of the crate's first page, without a type annotation and with `oneshot`.
#[tokio::test]
async fn the_client_stack_compiles_inside_tokio_spawn() {
    let breaker = CircuitBreakerLayer::http();
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http().backoff(Backoff::constant(ms(1))))
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(service_fn(refused));
    let request = Request::get("http://127.0.0.1/").body(Empty::<Bytes>::new()).unwrap();
    let ask = client.clone();
    let result = tokio::spawn(async move { ask.oneshot(request).await }).await.unwrap();
    assert_eq!(told(&result).stop, GiveUpReason::AttemptsUsedUp);
    assert_eq!(told(&result).made, 3);

    // Over the real client; not driven, because that would open a socket.
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build_http(),
        );
    let request = Request::get("http://127.0.0.1/").body(Empty::<Bytes>::new()).unwrap();
    let task = tokio::spawn(async move {
        yield_now().await;
        client.oneshot(request).await.map(|_| ())
    });
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
}

async fn refused<B>(_: Request<B>) -> Result<Response<Empty<Bytes>>, std::io::Error> {
    Err(std::io::ErrorKind::ConnectionRefused.into())
}

/// A service of any types with a closure. Its requests are `Clone`, and its error type is unchanged.
#[tokio::test(start_paused = true)]
async fn any_clone_type_is_retried_by_a_closure() {
    let calls = Arc::new(AtomicU32::new(0));
    let count = calls.clone();
    let layer = RetryLayer::new().classify(|result: Result<&u32, &Oops>| match result {
        Ok(_) => Outcome::success(),
        Err(Oops("final")) => Outcome::success(),
        Err(Oops("busy")) => Outcome::throttled().with_retry_after(ms(500)),
        Err(_) => Outcome::failure(),
    });
    let handle = layer.handle();
    let service = layer.layer(service_fn(move |errors: Vec<&'static str>| {
        let n = count.fetch_add(1, SeqCst) as usize;
        async move { errors.get(n).map_or(Ok(n as u32), |error| Err(Oops(error))) }
    }));
    let start = Instant::now();
    assert_eq!(send(&service, vec!["busy", "x"]).await, Ok(2));
    assert!(start.elapsed() >= ms(500));
    calls.store(0, SeqCst);
    assert_eq!(send(&service, vec!["final"]).await, Err(Oops("final")));
    assert_eq!(calls.swap(0, SeqCst), 1);
    assert_eq!(send(&service, vec!["1", "2", "3"]).await, Err(Oops("3")));
    assert_eq!(handle.snapshot().retries, 4);
    let mut future = task::spawn(service.clone().oneshot(Vec::new()));
    assert_eq!(assert_ready!(future.poll()), Ok(3));
}

/// A request type that implements how it is saved, and when it cannot be saved.
#[tokio::test(start_paused = true)]
async fn type_that_is_not_clone_is_retried_by_its_replay_implementation() {
    struct Upload(Option<&'static str>);

    impl Replay for Upload {
        type Saved = &'static str;

        fn save(&self) -> Option<&'static str> {
            self.0
        }

        fn replay(saved: &&'static str) -> Self {
            Self(Some(saved))
        }
    }

    let failing =
        |result: Result<&(), &Oops>| result.map_or(Outcome::failure(), |()| Outcome::success());
    let layer = RetryLayer::new().classify(failing);
    let handle = layer.handle();
    let service = layer.layer(service_fn(|_: Upload| async { Err::<(), _>(Oops("x")) }));
    send(&service, Upload(Some("text"))).await.unwrap_err();
    assert_eq!(handle.snapshot().retries, 2);
    send(&service, Upload(None)).await.unwrap_err();
    assert_eq!((handle.snapshot().retries, handle.snapshot().gave_up), (2, 2));
}

/// A `reqwest::Client` without an adapter. Its requests are retried by the rules of HTTP.
#[tokio::test(start_paused = true)]
async fn reqwests_own_requests_are_retried_as_http() {
    use buttress::retry::Reqwest;
    use reqwest::{Body, Request, Response};

    fn layer() -> RetryLayer<Reqwest> {
        let backoff = Backoff::constant(ms(1));
        RetryLayer::http().backoff(backoff).retry_on(StatusCode::CONFLICT).reqwest()
    }
    fn ask(method: Method, body: Option<Body>) -> Request {
        let mut request = Request::new(method, "http://127.0.0.1/a?b".parse().unwrap());
        *request.body_mut() = body;
        request
    }
    let calls = Arc::new(AtomicU32::new(0));
    let count = calls.clone();
    let answer = move |code: u16| {
        let count = count.clone();
        service_fn(move |request: Request| {
            count.fetch_add(1, SeqCst);
            assert_eq!(request.url().query(), Some("b"));
            let response = Response::from(status(code).map(|_| "body"));
            async move { Ok::<_, reqwest::Error>(response) }
        })
    };
    for (request, code, made, stop) in [
        (ask(Method::GET, None), 503, 3, GiveUpReason::AttemptsUsedUp),
        (ask(Method::GET, None), 409, 3, GiveUpReason::AttemptsUsedUp),
        (ask(Method::PUT, Some("text".into())), 503, 3, GiveUpReason::AttemptsUsedUp),
        (ask(Method::POST, Some("text".into())), 503, 1, GiveUpReason::Unsafe),
        (
            ask(Method::PUT, Some(Body::wrap(Full::<Bytes>::from("text")))),
            503,
            1,
            GiveUpReason::BodyGone,
        ),
        (ask(Method::GET, None), 404, 1, GiveUpReason::Responded),
    ] {
        calls.store(0, SeqCst);
        let response = send(&layer().layer(answer(code)), request).await.unwrap();
        let told = response.extensions().get::<Attempts>();
        assert_eq!(
            told.map_or((1, GiveUpReason::Responded), |told| (told.made, told.stop)),
            (made, stop)
        );
        assert_eq!(calls.load(SeqCst), made);
        assert_eq!(response.text().await.unwrap(), "body");
    }
    // The real client and a port without a listener: any method is retried.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut request = ask(Method::POST, Some("text".into()));
    request.url_mut().set_port(Some(gone.port())).unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let error = send(&layer().layer(client), request).await.unwrap_err();
    assert_eq!(Attempts::find(&*error).unwrap().made, 3);
}
