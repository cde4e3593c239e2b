use buttress::{call::*, *};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};

#[tokio::test(start_paused = true)]
async fn retries_a_get_and_says_so() {
    let n = Arc::new(AtomicU32::new(0));
    let m = n.clone();
    let inner = service_fn(move |req: Request<retry::ReplayBody<Full<Bytes>>>| {
        let n = m.clone();
        async move {
            let got = req.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(got, "ping");
            let k = n.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(
                Response::builder()
                    .status(if k < 2 { 503 } else { 200 })
                    .body(Full::new(Bytes::from("hi")))
                    .unwrap(),
            )
        }
    });
    let layer = RetryLayer::http();
    let handle = layer.handle();
    let mut svc = ServiceBuilder::new().layer(layer).service(inner);
    let res = svc
        .ready()
        .await
        .unwrap()
        .call(Request::put("/").body(Full::new(Bytes::from("ping"))).unwrap())
        .await
        .unwrap();
    assert_eq!(res.status(), 200);
    assert_eq!(Attempts::of(&res).made, 3);
    println!("{:?} {:?}", Attempts::of(&res), handle.snapshot());
    let res = svc
        .clone()
        .oneshot(Request::post("/").body(Full::new(Bytes::from("ping"))).unwrap())
        .await
        .unwrap();
    assert_eq!(res.status(), 200);
    n.store(0, Ordering::SeqCst);
    let res = svc
        .oneshot(Request::post("/").body(Full::new(Bytes::from("ping"))).unwrap())
        .await
        .unwrap();
    assert_eq!(res.status(), 503);
    println!("{:?}", Attempts::of(&res));
}

#[tokio::test]
async fn stack_in_spawn() {
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(50))
        .service(
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build_http(),
        );
    let err = tokio::spawn(async move {
        client
            .oneshot(Request::get("http://127.0.0.1:1/").body(Empty::<Bytes>::new()).unwrap())
            .await
            .unwrap_err()
    })
    .await
    .unwrap();
    println!("{err:?} {:?}", Attempts::find(&*err));
    let svc = service_fn(|_: u32| async { Err::<u32, BoxError>("x".into()) });
    let boxed = tower::util::BoxCloneSyncService::new(svc);
    let mut s = ServiceBuilder::new()
        .layer(RetryLayer::http().classify(|r: Result<&u32, &BoxError>| {
            if r.is_ok() { Outcome::success() } else { Outcome::failure() }
        }))
        .service(boxed);
    println!(
        "{:?}",
        tokio::spawn(async move { s.ready().await.unwrap().call(1).await }).await.unwrap()
    );
    let _ = Duration::ZERO;
    let _ = Http;
}
