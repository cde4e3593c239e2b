//! Limits come and go, and their calls outlive them.

use std::{collections::VecDeque, future::pending};

use buttress::{BoxError, ConcurrencyLimitLayer};
use futures_util::FutureExt;
use tower::{Layer, ServiceExt, service_fn};

#[test]
fn limit_of_its_own_for_each_layer_while_calls_of_those_gone_go_on() {
    let pending = || service_fn(|()| pending::<Result<(), BoxError>>());
    let mut under_way = VecDeque::new();
    for round in 0..10_000 {
        let layer = ConcurrencyLimitLayer::new(2).per_response();
        let handle = layer.handle();
        assert_eq!((handle.snapshot().limit, handle.in_flight()), (2, 0), "round {round}");
        let mut calls: Vec<_> = (0..3).map(|_| layer.layer(pending()).oneshot(())).collect();
        let refused = calls.iter_mut().filter_map(|call| call.now_or_never()).count();
        assert_eq!((handle.in_flight(), refused), (2, 1), "round {round}");
        calls.truncate(2);
        drop((layer, handle));
        under_way.extend(calls);
        // Those of an older one, whose memory may be somebody else's soon.
        if under_way.len() > 14 {
            under_way.pop_front();
        }
        if round % 100 == 99 {
            under_way.clear();
        }
    }
}
