//! The minimum rate of request bodies.

use buttress::{
    BoxError, ConcurrencyLimitLayer, TimeoutLayer, Timeouts,
    timeout::{SendingBody, TimeoutPhase},
};
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt};

use crate::layers::time::fixtures::*;
use crate::support::Oops;

/// Each frame of [`Paced`] has 5 bytes.
const RATE: u32 = 5;

fn layer() -> TimeoutLayer {
    TimeoutLayer::new(
        Timeouts::new().request_idle(secs(60)).min_body_rate(RATE).body_grace(secs(5)),
    )
}

/// Reads the whole request, then responds.
fn reader() -> impl tower::Service<
    Request<SendingBody<Paced>>,
    Response = Response<Full<bytes::Bytes>>,
    Error = BoxError,
    Future: Send,
> + Clone {
    serve(|request: Request<SendingBody<Paced>>| async move {
        request.into_body().collect().await.map_err(|_| Oops("the request broke off"))?;
        Ok(Response::new(Full::<bytes::Bytes>::default()))
    })
}

#[tokio::test(start_paused = true)]
async fn trickled_request_body_is_ended_and_its_permit_released() {
    let (layer, limit) = (layer(), ConcurrencyLimitLayer::new(1));
    let (handle, permits) = (layer.handle(), limit.handle());
    let service = limit.layer(layer.layer(reader()));
    let start = Instant::now();
    // A frame every 50 s: the grace is used up before the first one.
    let error = service.oneshot(Request::new(Paced::every(secs(50), 100))).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::BodyRate, secs(5)));
    assert_eq!(error.to_string(), "rejected by timeout: request body is below the minimum rate");
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.timed_out_by(TimeoutPhase::BodyRate), snapshot.timed_out()), (1, 1));
    assert_eq!(permits.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn each_byte_adds_the_time_that_it_takes_at_the_minimum_rate() {
    // Three frames at once add 3 s to the grace.
    let body = Paced::at([0, 0, 0].map(secs)).then_silent();
    let start = Instant::now();
    let error = layer().layer(reader()).oneshot(Request::new(body)).await.unwrap_err();
    assert_eq!((phase_of(&error), start.elapsed()), (TimeoutPhase::BodyRate, secs(8)));

    // An upload just above the rate is not ended, whatever its duration.
    let body = Paced::every(ms(999), 10_000);
    layer().layer(reader()).oneshot(Request::new(body)).await.unwrap();
    // An upload just below the rate is ended when the grace is used up.
    let (body, start) = (Paced::every(ms(1010), 10_000), Instant::now());
    let error = layer().layer(reader()).oneshot(Request::new(body)).await.unwrap_err();
    assert_eq!(phase_of(&error), TimeoutPhase::BodyRate);
    assert!(start.elapsed() < secs(550), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn allowance_of_a_fast_body_is_bounded() {
    // Without the bound, 100,000 bytes at once would add more than 5 hours.
    let burst = vec![std::time::Duration::ZERO; 20_000];
    let trickle = (1..400).map(|nth| secs(50) * nth);
    let body = Paced::at(burst.into_iter().chain(trickle));
    let start = Instant::now();
    let error = layer().layer(reader()).oneshot(Request::new(body)).await.unwrap_err();
    assert_eq!(phase_of(&error), TimeoutPhase::BodyRate);
    assert!(start.elapsed() <= secs(65), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn time_in_which_the_service_does_not_poll_the_body_is_not_charged() {
    let service = layer().layer(serve(|request: Request<SendingBody<Paced>>| async move {
        let mut body = request.into_body();
        while !http_body::Body::is_end_stream(&body) {
            sleep(secs(100)).await;
            body.frame().await.unwrap()?;
        }
        Ok(Response::new(Full::<bytes::Bytes>::default()))
    }));
    service.oneshot(Request::new(Paced::every(secs(90), 20))).await.unwrap();

    // The reader ends its first wait, and polls again much later.
    let service = layer().layer(serve(|request: Request<SendingBody<Paced>>| async move {
        let mut body = request.into_body();
        for _ in 0..3 {
            let wait = tokio::time::timeout(ms(10), body.frame()).await;
            assert!(wait.is_err(), "no frame has arrived");
            sleep(secs(60)).await;
            body.frame().await.unwrap()?;
        }
        Ok(Response::new(Full::<bytes::Bytes>::default()))
    }));
    service.oneshot(Request::new(Paced::every(secs(50), 10))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn rate_is_enforced_after_the_response_head() {
    let layer = layer();
    let handle = layer.handle();
    let service = layer.layer(serve(|request: Request<SendingBody<Paced>>| async move {
        Ok(Response::new(request.into_body()))
    }));
    let start = Instant::now();
    let response = service.oneshot(Request::new(Paced::every(secs(4), 100))).await.unwrap();
    let (frames, end) = drain(response.into_body()).await;
    // The allowance is 5 s and one second per frame. The first frame leaves 2 s of it, and the second frame arrives 4 s
    // later.
    assert_eq!((frames, phase_of(&end.unwrap_err())), (1, TimeoutPhase::BodyRate));
    assert_eq!(start.elapsed(), secs(6));
    assert_eq!(handle.snapshot().timed_out_by(TimeoutPhase::BodyRate), 1);
}

#[tokio::test(start_paused = true)]
async fn grpc_over_http2_has_no_minimum_rate_unless_it_is_covered() {
    let request = |version| {
        let request = Request::post("/shop.Orders/Upload").version(version);
        let request = request.header("content-type", "application/grpc");
        request.body(Paced::every(secs(50), 4)).unwrap()
    };
    let exempt = layer().layer(reader()).oneshot(request(Version::HTTP_2)).await;
    exempt.unwrap();
    for (layer, version) in
        [(layer(), Version::HTTP_11), (layer().min_body_rate_for_grpc(true), Version::HTTP_2)]
    {
        let error = layer.layer(reader()).oneshot(request(version)).await.unwrap_err();
        assert_eq!(phase_of(&error), TimeoutPhase::BodyRate);
    }
}

#[tokio::test(start_paused = true)]
async fn rate_can_be_set_for_one_request_and_while_the_layer_runs() {
    let layer = layer();
    let handle = layer.handle();
    let service = layer.layer(reader());
    let request = |timeouts: Option<Timeouts>| {
        let mut request = Request::new(Paced::every(secs(20), 3));
        timeouts.map(|timeouts| request.extensions_mut().insert(timeouts));
        request
    };
    for off in [Timeouts::new().min_body_rate(None), Timeouts::new().body_grace(secs(60))] {
        service.clone().oneshot(request(Some(off))).await.unwrap();
    }
    assert!(service.clone().oneshot(request(None)).await.is_err());
    handle.set(Timeouts::new().min_body_rate(None)).unwrap();
    service.clone().oneshot(request(None)).await.unwrap();
    handle.set(Timeouts::new().min_body_rate(1)).unwrap();
    assert!(service.clone().oneshot(request(None)).await.is_err());
    assert_eq!(handle.snapshot().timeouts.get_min_body_rate(), Some(1));
}

#[test]
fn rates_and_graces_of_zero_are_errors() {
    let rate = Timeouts::new().min_body_rate(0).check().unwrap_err();
    assert_eq!(
        rate.to_string(),
        "`min_body_rate` is 0: use 1 byte per second or more, or none for no limit"
    );
    let grace = Timeouts::new().body_grace(secs(0)).check().unwrap_err();
    assert_eq!(grace.field, "body_grace");
    assert!(TimeoutLayer::http().min_body_rate(0).checked().is_err());
    assert!(Timeouts::new().min_body_rate(u32::MAX).body_grace(secs(u64::MAX)).check().is_ok());
    assert_eq!(Timeouts::server().get_min_body_rate(), Some(240));
    assert_eq!(Timeouts::http().get_min_body_rate(), None);
}
