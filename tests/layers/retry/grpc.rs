//! gRPC: the status in the head or in the trailers, pushback, and streams whose first frame is late.

use std::time::Duration;

use buttress::{
    Attempts, Backoff, Deadline, Rejected, RetryLayer, outcome::RejectedKind, retry::GiveUpReason,
};
use http::Response;
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::Instant;
use tower::Layer;

use super::fixtures::*;

fn layer() -> RetryLayer {
    RetryLayer::grpc().backoff(Backoff::constant(ms(5)).without_jitter()).budget(purse(9))
}

fn head(pairs: &[(&'static str, &'static str)]) -> Response<ScriptBody> {
    let mut response = with_headers(200, pairs);
    response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    response
}

fn body(pieces: impl IntoIterator<Item = Piece>) -> Response<ScriptBody> {
    head(&[]).map(|_| ScriptBody::new(pieces).without_hints())
}

/// Returns the record of a call whose attempts all receive this response.
async fn outcome(answer: impl Fn() -> Response<ScriptBody> + Send + Sync + 'static) -> Attempts {
    let inner: Inner = Inner::new(move |_| Ok(answer()));
    let log = inner.log.clone();
    let response = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!(told.made, log.calls());
    // The caller receives a complete response.
    read(response.into_body()).await;
    told
}

#[tokio::test(start_paused = true)]
async fn unavailable_is_retried_in_the_head_and_in_the_trailers() {
    for code in 0..=17u8 {
        let text: &'static str = code.to_string().leak();
        let expected = if code == 14 {
            (3, GiveUpReason::AttemptsUsedUp)
        } else {
            (1, GiveUpReason::Responded)
        };
        let told = outcome(move || head(&[("grpc-status", text)])).await;
        assert_eq!((told.made, told.stop), expected, "{code} in the head");
        let told = outcome(move || body([trailers(&[("grpc-status", text)])])).await;
        assert_eq!((told.made, told.stop), expected, "{code} in the trailers");
    }
    for text in ["", "x", "-14", "1400000000000", "14.0"] {
        let told = outcome(move || head(&[("grpc-status", text)])).await;
        assert_eq!(told.made, 1, "{text:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn resource_exhausted_is_retried_only_with_pushback() {
    for (pairs, made, stop) in [
        (&[("grpc-status", "8")][..], 1, GiveUpReason::Responded),
        (&[("grpc-status", "8"), ("retry-after", "1")], 1, GiveUpReason::Responded),
        (
            &[("grpc-status", "8"), ("grpc-retry-pushback-ms", "20")],
            3,
            GiveUpReason::AttemptsUsedUp,
        ),
        (&[("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")], 1, GiveUpReason::Pushback),
        (&[("grpc-status", "13"), ("grpc-retry-pushback-ms", "20")], 1, GiveUpReason::Responded),
    ] {
        let told = outcome(move || head(pairs)).await;
        assert_eq!((told.made, told.stop), (made, stop), "{pairs:?}");
        let told = outcome(move || body([trailers(pairs)])).await;
        assert_eq!((told.made, told.stop), (made, stop), "{pairs:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn pushback_is_a_minimum_delay_or_forbids_the_retry() {
    for text in ["-1", "-9999999999999", "x", "", "1.5", "99999999999999999999"] {
        let unavailable = [("grpc-status", "14"), ("grpc-retry-pushback-ms", text)];
        let told = outcome(move || head(&unavailable)).await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::Pushback), "{text:?}");
        let told = outcome(move || body([trailers(&unavailable)])).await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::Pushback), "{text:?}");
        // An HTTP status does not override the pushback.
        let told = outcome(move || {
            let mut response = head(&unavailable);
            *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            response
        });
        let told = told.await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::Pushback), "{text:?} on a 503");
    }
    let told = outcome(|| head(&[("grpc-status", "14"), ("grpc-retry-pushback-ms", "1000")]));
    let told = told.await;
    assert_eq!(told.made, 3);
    assert!(told.waited >= ms(2000) && told.waited <= ms(3000), "{told:?}");
    let told = outcome(|| head(&[("grpc-status", "14"), ("grpc-retry-pushback-ms", "30001")]));
    assert_eq!(told.await.stop, GiveUpReason::DelayTooLong);
}

#[tokio::test(start_paused = true)]
async fn a_response_with_a_message_is_returned() {
    let message = || body([data("message"), trailers(&[("grpc-status", "14")])]);
    assert_eq!(outcome(message).await.made, 1);
}

#[tokio::test(start_paused = true)]
async fn no_frame_is_lost_by_the_inspection_of_the_first() {
    let ok = trailers(&[("grpc-status", "0"), ("x-more", "1")]);
    for told in [true, false] {
        let ok = ok.clone();
        let inner: Inner = Inner::new(move |_| {
            let script = ScriptBody::new([data("one"), data("two"), ok.clone()]);
            Ok(head(&[]).map(|_| if told { script } else { script.without_hints() }))
        });
        let response = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
        assert!(response.extensions().is_empty());
        let body = response.into_body();
        assert_eq!(body.size_hint().exact(), told.then_some(6));
        assert!(!body.is_end_stream());
        let (all, trailers) = read(body).await;
        assert_eq!(all, "onetwo");
        assert_eq!(trailers, Some(map(&[("grpc-status", "0"), ("x-more", "1")])));
    }
}

/// The layer has seen the end of the body before it returns the response. A body must not be polled after its end.
#[tokio::test(start_paused = true)]
async fn a_body_is_not_polled_after_its_end() {
    let inner: Inner = Inner::new(|_| Ok(body([])));
    let response = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
    assert!(response.into_body().frame().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_fails_at_once_is_returned() {
    let inner: Inner = Inner::new(|_| Ok(body([Piece::Error])));
    let log = inner.log.clone();
    let response = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
    assert_eq!(response.into_body().frame().await.unwrap().unwrap_err(), Oops("body"));
    assert_eq!(log.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_begins_late_is_returned_at_once() {
    let pieces =
        [Piece::Pause(Duration::from_secs(60)), data("late"), trailers(&[("grpc-status", "0")])];
    let inner: Inner = Inner::new(move |_| Ok(body(pieces.clone())));
    let start = Instant::now();
    let response = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
    assert!(start.elapsed() <= ms(11), "{:?}", start.elapsed());
    let (all, end) = read(response.into_body()).await;
    assert_eq!((&all[..], end), (&b"late"[..], Some(map(&[("grpc-status", "0")]))));
    assert!(start.elapsed() >= Duration::from_secs(60));
    // A failure within 10 ms is still recognised.
    let late = || body([Piece::Pause(ms(5)), trailers(&[("grpc-status", "14")])]);
    assert_eq!(outcome(late).await.made, 3);
}

/// gRPC-Web sends its trailers in the body. The layer does not wait for them.
#[tokio::test(start_paused = true)]
async fn grpc_web_bodies_are_not_inspected() {
    let inner: Inner = Inner::new(|_| {
        let mut response = body([Piece::Pause(ms(5)), data("message")]);
        let web = "application/grpc-web+proto".parse().unwrap();
        response.headers_mut().insert("content-type", web);
        Ok(response)
    });
    let start = Instant::now();
    send(&layer().layer(inner), post(ScriptBody::text("ask"))).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
}

/// The server may have processed the call. The layer repeats a call only if the server declares that it has not.
#[tokio::test(start_paused = true)]
async fn a_call_whose_connection_failed_is_not_retried() {
    use std::io::ErrorKind as K;
    for kind in [K::TimedOut, K::ConnectionReset, K::BrokenPipe] {
        let inner: Inner = Inner::new(move |_| Err(io(kind)));
        let result = send(&layer().layer(inner), post(ScriptBody::text("ask"))).await;
        assert_eq!((told(&result).made, told(&result).stop), (1, GiveUpReason::Unsafe), "{kind}");
    }
}

/// Without `grpc()` a call is a `POST`, which is repeated only if it has an idempotency key.
#[tokio::test(start_paused = true)]
async fn the_http_layer_does_not_retry_grpc_calls() {
    let inner: Inner = Inner::new(|_| Ok(head(&[("grpc-status", "14")])));
    let service = RetryLayer::http().layer(inner);
    let response = send(&service, post(ScriptBody::text("ask"))).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, GiveUpReason::Unsafe);
    let mut keyed = post(ScriptBody::text("ask"));
    keyed.headers_mut().insert("idempotency-key", "k".parse().unwrap());
    assert_eq!(Attempts::of(&send(&service, keyed).await.unwrap()).made, 3);
}

/// gRFC A6: the header counts the earlier attempts that a server may have received.
#[tokio::test(start_paused = true)]
async fn retries_carry_the_number_of_previous_attempts() {
    let told = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = told.clone();
    let inner = Inner::with(move |n, request| {
        let header = request.headers().get("grpc-previous-rpc-attempts").cloned();
        log.lock().unwrap().push(header.map(|value| value.to_str().unwrap().to_owned()));
        async move {
            match n {
                1 => Err(Rejected::new(RejectedKind::Full).with_retry_after(ms(1)).into()),
                2 | 4 => Ok(head(&[("grpc-status", "14")])),
                3 => Err(io(std::io::ErrorKind::ConnectionRefused)),
                _ => Ok(head(&[("grpc-status", "0")])),
            }
        }
    });
    let service = layer().attempts(5).wait_on_rejection(true).layer(inner);
    let mut call = post(ScriptBody::text("ask"));
    call.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    call.extensions_mut().insert(Deadline::after(ms(9000)));
    send(&service, call).await.unwrap();
    let said = |n: &str| Some(n.to_owned());
    assert_eq!(
        *told.lock().unwrap(),
        [None, None, said("1"), said("1"), said("2")],
        "attempts that no server has received do not count"
    );
}
