//! HTTP/2: GOAWAY, refused and reset streams, connections that break.

use std::time::Duration;

use buttress::{
    Attempts, Outcome, RetryBudget, RetryLayer,
    breaker::CircuitState,
    outcome::{OutcomeKind, Reason},
    reqwest::HttpClient,
    retry::GiveUpReason,
};
use futures_util::future::join;
use http::Method;
use tower::{Layer, ServiceBuilder, ServiceExt};

use super::{Kind, fails, opens_at_first_failure, request, stack};
use crate::support::{
    net::{get, soon},
    rpc,
    scripted_peer::{self, ENDS, End, Second},
};

const NO_ERROR: u32 = 0;
const INTERNAL_ERROR: u32 = 2;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;

/// What the server does, how it counts, and whether a POST is retried.
const ROWS: [(Second, OutcomeKind, Reason, bool); 7] = [
    (Second::GoAway(NO_ERROR), OutcomeKind::Cancelled, Reason::GoAway, true),
    (Second::GoAway(ENHANCE_YOUR_CALM), OutcomeKind::Failure, Reason::GoAway, true),
    (Second::Reset(REFUSED_STREAM), OutcomeKind::Cancelled, Reason::RefusedStream, true),
    (Second::Reset(INTERNAL_ERROR), OutcomeKind::Failure, Reason::Reset, false),
    (Second::Reset(CANCEL), OutcomeKind::Failure, Reason::Reset, false),
    (Second::Close(End::Fin), OutcomeKind::Cancelled, Reason::StaleConnection, false),
    (Second::Close(End::Rst), OutcomeKind::Cancelled, Reason::StaleConnection, false),
];

const KINDS: [Kind; 2] = [Kind::HyperUtil, Kind::Connect];

#[tokio::test]
async fn the_end_of_a_stream_is_classified_by_its_code() {
    for kind in KINDS {
        for (second, expected, reason, _) in ROWS {
            let peer = scripted_peer::http2(second).await;
            let client = kind.http2();
            soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
            let error = fails(&client, Method::GET, peer.addr).await;
            let outcome = Outcome::of_error(&*error);
            let reason = match (kind, reason) {
                // hyper-util does not reveal that the connection was reused.
                (Kind::HyperUtil, Reason::StaleConnection) => Reason::Reset,
                _ => reason,
            };
            let found = (outcome.kind(), outcome.reason());
            assert_eq!(found, (expected, reason), "{kind:?} {second:?}: {error:?}");
            assert_eq!(peer.ended(), 1);
        }
    }
}

#[tokio::test]
async fn the_end_of_a_stream_decides_whether_it_is_retried() {
    for kind in KINDS {
        for (second, expected, _, post) in ROWS {
            for (method, retried) in [(Method::GET, true), (Method::POST, post)] {
                let peer = scripted_peer::http2(second).await;
                let breaker = opens_at_first_failure();
                let (circuit, budget) = (breaker.handle(), RetryBudget::with(1.0, 0, 9));
                // A circuit that opens would end the retries.
                circuit.set_shadow(true);
                let client = stack(&budget, breaker, kind.http2());
                soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
                let result = soon(client.oneshot(request(method.clone(), peer.addr))).await;
                let case = format!("{kind:?} {second:?} {method}");
                match result {
                    Ok(response) => assert_eq!(Attempts::of(&response).made, 2, "{case}"),
                    Err(error) => {
                        assert_eq!(
                            Attempts::find(&*error).unwrap().stop,
                            GiveUpReason::Unsafe,
                            "{case}"
                        );
                        assert!(!retried, "{case}");
                    }
                }
                assert_eq!(peer.ended(), 1, "{case}");
                let is_failure = expected == OutcomeKind::Failure;
                let opened = circuit.snapshot().opened > 0;
                assert_eq!(opened, is_failure, "{case}");
                // A GOAWAY with an error code is a failure, but its retry is transparent.
                let is_charged = retried && is_failure && !post;
                assert_eq!(budget.balance(), if is_charged { 1.0 } else { 2.0 }, "{case}");
            }
        }
    }
}

/// The service inside of the retry reads the body, so the error of the body is the error of the call.
#[tokio::test]
async fn a_stream_that_is_refused_after_the_response_head_is_a_failure_and_a_post_is_not_retried() {
    for kind in KINDS {
        for code in [REFUSED_STREAM, INTERNAL_ERROR] {
            let peer = scripted_peer::http2(Second::ResetBody(code)).await;
            let breaker = opens_at_first_failure();
            let circuit = breaker.handle();
            let client = stack(&RetryBudget::default(), breaker, kind.http2());
            soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
            let post = request(Method::POST, peer.addr);
            let Err(error) = soon(client.oneshot(post)).await else { panic!("retried") };
            let case = format!("{kind:?} {code}: {error:?}");
            let outcome = Outcome::of_error(&*error);
            assert_eq!(outcome, Outcome::failure().because(Reason::Body), "{case}");
            assert_eq!(Attempts::find(&*error).unwrap().made, 1, "{case}");
            assert_eq!((circuit.state(), peer.ended()), (CircuitState::Open, 1), "{case}");
        }
    }
}

/// The breaker wraps tonic's channel directly, so the error type is tonic's own.
#[tokio::test]
async fn errors_of_a_tonic_channel_are_classified_alike() {
    for (second, expected, ..) in ROWS {
        let peer = scripted_peer::http2(second).await;
        let breaker = opens_at_first_failure();
        let circuit = breaker.handle();
        let client = breaker.layer(rpc::channel(peer.addr));
        let call = || {
            let mut request = request::<tonic::body::Body>(Method::POST, peer.addr);
            *request.version_mut() = http::Version::HTTP_2;
            soon(client.clone().oneshot(request))
        };
        call().await.unwrap();
        let Err(error) = call().await else { panic!("{second:?}: responded") };
        let state = match expected {
            OutcomeKind::Failure => CircuitState::Open,
            _ => CircuitState::Closed,
        };
        assert_eq!((circuit.state(), peer.ended()), (state, 1), "{second:?}: {error:?}");
        if state == CircuitState::Closed {
            call().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_new_connection_that_breaks_is_a_failure() {
    for end in ENDS {
        let peer = scripted_peer::http2_ends_all(end).await;
        let error = fails(&Kind::Connect.http2(), Method::GET, peer.addr).await;
        let outcome = Outcome::of_error(&*error);
        let found = (outcome.kind(), outcome.reason());
        assert_eq!(found, (OutcomeKind::Failure, Reason::Reset), "{end:?}: {error:?}");
    }
}

#[tokio::test]
async fn an_http2_handshake_that_fails_is_a_failure() {
    for kind in KINDS {
        for end in ENDS {
            let peer = scripted_peer::ends_at_once(end).await;
            let breaker = buttress::CircuitBreakerLayer::http();
            let circuit = breaker.handle();
            let client = breaker.layer(kind.http2());
            for _ in 0..5 {
                let get = request(Method::GET, peer.addr);
                soon(client.clone().oneshot(get)).await.unwrap_err();
            }
            assert_eq!(circuit.state(), CircuitState::Open, "{kind:?} {end:?}");
        }
    }
}

/// hyper classifies this error as one of its user.
#[tokio::test]
async fn a_dispatch_task_that_is_gone_is_a_reset_and_is_retried() {
    for retries in [false, true] {
        let peer =
            scripted_peer::http2_goes_away_from_a_waiting_request(Duration::from_millis(100)).await;
        let (bare, breaker) = (Kind::HyperUtil.http2(), opens_at_first_failure());
        let circuit = breaker.handle();
        let client = stack(&RetryBudget::default(), breaker, bare.clone());
        soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
        // The second request holds the only stream.
        let second = bare.clone().oneshot(request(Method::GET, peer.addr));
        if retries {
            let third = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                client.oneshot(request(Method::GET, peer.addr)).await
            };
            let (_, response) = soon(join(second, third)).await;
            let attempts = Attempts::of(&response.unwrap());
            assert_eq!((attempts.made, attempts.stop), (2, GiveUpReason::Responded));
            assert!(attempts.records()[0].outcome.is_housekeeping(), "{attempts:?}");
            assert_eq!(circuit.state(), CircuitState::Closed);
        } else {
            let third = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                fails(&bare, Method::GET, peer.addr).await
            };
            let (_, error) = soon(join(second, third)).await;
            let mut chain = std::iter::successors(error.source(), |error| error.source());
            let hyper = chain.find_map(|error| error.downcast_ref::<hyper::Error>()).unwrap();
            assert_eq!(hyper.to_string(), "dispatch task is gone");
            let outcome = Outcome::of_error(&*error);
            assert_eq!((outcome.kind(), outcome.reason()), (OutcomeKind::Cancelled, Reason::Reset));
        }
    }
}

/// [`connect::Client`](buttress::connect::Client) does not let a request wait inside of hyper.
#[tokio::test]
async fn a_request_without_a_stream_is_sent_over_another_connection() {
    let peer =
        scripted_peer::http2_goes_away_from_a_waiting_request(Duration::from_millis(100)).await;
    let client = Kind::Connect.http2();
    soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
    let second = client.clone().oneshot(request(Method::GET, peer.addr));
    let third = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        client.clone().oneshot(request(Method::GET, peer.addr)).await
    };
    let (second, third) = soon(join(second, third)).await;
    second.unwrap_err();
    third.unwrap();
    assert_eq!(peer.connections(), 2);
}

/// A client of reqwest with its default settings sends each attempt up to three times. The second row proves that the
/// peer counts this.
#[tokio::test]
async fn retries_of_reqwest_do_not_multiply_with_attempts() {
    let builder = || reqwest::Client::builder().no_proxy().http2_prior_knowledge();
    for (client, factor) in [
        (HttpClient::from_builder(builder()).unwrap(), 1),
        (HttpClient::new(builder().build().unwrap()), 3),
    ] {
        let peer = scripted_peer::http2_refuses_all().await;
        let client = ServiceBuilder::new().layer(RetryLayer::http()).service(client);
        let error = soon(client.oneshot(get(peer.addr, "/"))).await.unwrap_err();
        let made = Attempts::find(&*error).unwrap().made as usize;
        assert!(made > 1);
        assert_eq!(peer.ended(), factor * made);
    }
}
