//! HTTP/1.1: stale keep-alive connections, and servers that fail.

use std::time::Duration;

use buttress::{
    Attempts, CircuitBreakerLayer, Outcome, RetryBudget, RetryLayer,
    breaker::CircuitState,
    outcome::{OutcomeKind, Reason},
    retry::GiveUpReason,
};
use bytes::Bytes;
use futures_util::future::join_all;
use http::Method;
use http_body_util::Empty;
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

use super::{KINDS, Kind, fails, opens_at_first_failure, request, stack};
use crate::support::{
    net::{soon, until},
    scripted_peer::{self, ENDS},
};

const STALE: usize = 5;

#[tokio::test]
async fn five_stale_connections_in_a_row_lose_no_request() {
    for kind in KINDS {
        for end in ENDS {
            let peer = scripted_peer::goes_stale(STALE, end).await;
            let breaker = opens_at_first_failure();
            let circuit = breaker.handle();
            let budget = RetryBudget::with(0.1, 0, 1);
            let client = stack(&budget, breaker, kind.http1());
            let get = || soon(client.clone().oneshot(request(Method::GET, peer.addr)));
            for response in join_all((0..STALE).map(|_| get())).await {
                assert_eq!(response.unwrap().status(), 200);
            }
            // The connections return to the pool.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let response = get().await.unwrap();
            let attempts = Attempts::of(&response);
            let case = format!("{kind:?} {end:?} {attempts:?}");
            assert_eq!((response.status().as_u16(), peer.ended()), (200, STALE), "{case}");
            assert_eq!((attempts.made, attempts.waited), (6, Duration::ZERO), "{case}");
            assert_eq!(circuit.state(), CircuitState::Closed, "{case}");
            // No retry made a withdrawal from the budget: each of the six calls has deposited a tenth.
            assert!((0.599..0.601).contains(&budget.balance()), "{case}: {}", budget.balance());
        }
    }
}

/// The server may have processed the request.
#[tokio::test]
async fn a_stale_connection_loses_a_post_and_is_neutral() {
    for kind in KINDS {
        for end in ENDS {
            let peer = scripted_peer::goes_stale(1, end).await;
            let breaker = opens_at_first_failure();
            let circuit = breaker.handle();
            let client = stack(&RetryBudget::default(), breaker, kind.http1());
            soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let post = request(Method::POST, peer.addr);
            let Err(error) = soon(client.oneshot(post)).await else { panic!("responded") };
            let (attempts, outcome) =
                (Attempts::find(&*error).unwrap(), Outcome::of_error(&*error));
            let case = format!("{kind:?} {end:?}: {error:?}");
            assert_eq!((attempts.made, attempts.stop), (1, GiveUpReason::Unsafe), "{case}");
            assert!(outcome.is_housekeeping(), "{case}");
            match kind {
                Kind::Connect => assert_eq!(outcome.reason(), Reason::StaleConnection, "{case}"),
                Kind::HyperUtil | Kind::Reqwest => {
                    assert_eq!(outcome.reason(), Reason::Reset, "{case}");
                }
            }
            assert_eq!((circuit.state(), peer.ended()), (CircuitState::Closed, 1), "{case}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_breaks_after_the_response_head_is_a_failure() {
    for end in ENDS {
        let peer = scripted_peer::cuts_off_bodies(end).await;
        for kind in KINDS {
            let error = fails(&kind.http1(), Method::GET, peer.addr).await;
            let outcome = Outcome::of_error(&*error);
            assert_eq!(outcome, Outcome::failure().because(Reason::Body), "{kind:?}: {error:?}");
        }
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let response = client.get(format!("http://{}/", peer.addr)).send().await.unwrap();
        let error = response.bytes().await.unwrap_err();
        let outcome = Outcome::of_error(&error);
        assert_eq!(outcome, Outcome::failure().because(Reason::Body), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_ends_every_connection_opens_the_circuit() {
    for kind in KINDS {
        for end in ENDS {
            for peer in [scripted_peer::ends_all(end).await, scripted_peer::ends_at_once(end).await]
            {
                let breaker = CircuitBreakerLayer::http();
                let circuit = breaker.handle();
                let client = breaker.layer(kind.http1());
                for call in 1..=5 {
                    assert_eq!(
                        circuit.state(),
                        CircuitState::Closed,
                        "{kind:?} {end:?}: call {call}"
                    );
                    let get = request(Method::GET, peer.addr);
                    soon(client.clone().oneshot(get)).await.unwrap_err();
                }
                assert_eq!(circuit.state(), CircuitState::Open, "{kind:?} {end:?}");
            }
        }
    }
}

/// The server may end the connection before hyper takes the request from its queue. hyper then returns the request.
#[tokio::test]
async fn a_request_that_hyper_returns_unsent_is_never_sent() {
    for kind in KINDS {
        for end in ENDS {
            let peer = scripted_peer::ends_at_once(end).await;
            for _ in 0..30 {
                let error = fails(&kind.http1(), Method::POST, peer.addr).await;
                let chain = std::iter::successors(error.source(), |error| error.source());
                let mut hyper = chain.filter_map(|error| error.downcast_ref::<hyper::Error>());
                let is_returned = hyper.next().is_some_and(hyper::Error::is_canceled);
                let outcome = Outcome::of_error(&*error);
                let case = format!("{kind:?} {end:?}: {error:?}");
                let reason = if is_returned { Reason::NeverSent } else { Reason::Reset };
                assert_eq!(outcome.reason(), reason, "{case}");
                let is_broken = hyper.next().is_some() || !is_returned;
                let is_failure = kind == Kind::Connect && is_broken;
                assert_eq!(outcome.is_failure(), is_failure, "{case}");
            }
        }
    }
}

/// Two circuits over the same connections: the second one has not recorded a response.
#[tokio::test]
async fn a_stale_connection_is_neutral_for_a_circuit_without_a_response() {
    for end in ENDS {
        let peer = scripted_peer::responds_once(end).await;
        let client = Kind::Connect.http1();
        for _ in 0..3 {
            soon(client.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
            let breaker = opens_at_first_failure();
            let circuit = breaker.handle();
            let get = request(Method::GET, peer.addr);
            let error = soon(breaker.layer(client.clone()).oneshot(get)).await.unwrap_err();
            assert_eq!(circuit.state(), CircuitState::Closed, "{end:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn a_new_connection_that_breaks_is_a_failure_if_the_client_reveals_that_it_is_new() {
    for end in ENDS {
        let peer = scripted_peer::responds_once(end).await;
        for (kind, opens) in [(Kind::Connect, true), (Kind::HyperUtil, false)] {
            let breaker = CircuitBreakerLayer::http();
            let circuit = breaker.handle();
            let client = kind.http1();
            let stack = breaker.layer(client.clone());
            peer.set_broken(false);
            soon(stack.clone().oneshot(request(Method::GET, peer.addr))).await.unwrap();
            peer.set_broken(true);
            let outcome = Outcome::of_error(&*fails(&client, Method::GET, peer.addr).await);
            assert!(outcome.is_housekeeping(), "{kind:?}: this connection was reused");
            for _ in 0..5 {
                let get = request(Method::GET, peer.addr);
                let error = soon(stack.clone().oneshot(get)).await.unwrap_err();
                let outcome = Outcome::of_error(&*error);
                assert_eq!(outcome.is_failure(), opens, "{kind:?} {end:?}: {error:?}");
                if opens {
                    assert_eq!(outcome.reason(), Reason::Reset);
                    assert_eq!(outcome.kind(), OutcomeKind::Failure);
                }
            }
            let state = if opens { CircuitState::Open } else { CircuitState::Closed };
            assert_eq!(circuit.state(), state, "{kind:?} {end:?}");
        }
    }
}

#[tokio::test]
async fn nested_retries_do_not_multiply_transparent_retries() {
    for kind in [Kind::HyperUtil, Kind::Reqwest] {
        let peer = scripted_peer::ends_all(scripted_peer::End::Rst).await;
        let retry = || RetryLayer::http().budget(RetryBudget::with(0.1, 0, 1)).attempts(1);
        let client = ServiceBuilder::new()
            .layer(retry())
            .layer(retry())
            .layer(retry())
            .layer(MapRequestBodyLayer::new(|_| Empty::new()))
            .service(kind.http1());
        let get = request::<Empty<Bytes>>(Method::GET, peer.addr);
        let Err(error) = soon(client.oneshot(get)).await else { panic!("responded") };
        assert_eq!(peer.ended(), 6, "{kind:?}: {error:?}");
        assert_eq!(Attempts::find(&*error).unwrap().made, 1, "{kind:?}");
    }
}

#[tokio::test]
async fn the_client_s_own_error_is_among_the_sources() {
    let peer = scripted_peer::ends_all(scripted_peer::End::Fin).await;
    let error = fails(&Kind::Connect.http1(), Method::GET, peer.addr).await;
    assert_eq!(error.to_string(), "request failed on a new connection");
    let source = error.source().unwrap();
    assert!(source.is::<hyper_util::client::legacy::Error>(), "{error:?}");
    until(|| peer.connections() == 1).await;
}
