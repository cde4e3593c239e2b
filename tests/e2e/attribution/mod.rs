//! Every layer and both ready-made stacks, against every cause that is not a failure of the upstream, over sockets.
//!
//! Each pair of a [stack](stacks::STACKS) and a [cause](causes::CAUSES) is a case. After it the circuit is closed and
//! has counted no failure, an adaptive limit is unchanged, all permits are released, and the caller got what the table
//! of `buttress::outcome` states. The same cause then ends a half-open probe, which must not open the circuit.

mod causes;
mod stacks;

use buttress::breaker::CircuitState;
use causes::{CAUSES, Cause, Target};
use futures_util::{StreamExt, stream};
use stacks::{STACKS, Stack, Wire};

use crate::support::alone;

/// The maximum number of cases that run at the same time. With more, a successful call takes longer than the hedge
/// delay.
const MAX_CASES: usize = 8;

#[tokio::test(flavor = "multi_thread")]
async fn no_cause_outside_of_the_upstream_counts_against_it() {
    let _alone = alone().await;
    let cases = STACKS.iter().flat_map(|(name, build)| {
        CAUSES.iter().map(move |cause| {
            let case = format!("{name}: {cause:?}");
            async move {
                let wire = Wire::of(*cause);
                check_closed(&case, &build(wire).await, *cause).await;
                check_half_open(&case, &build(wire).await, *cause).await;
            }
        })
    });
    let run = async |case| tokio::spawn(case).await.unwrap();
    stream::iter(cases).for_each_concurrent(MAX_CASES, run).await;
}

async fn check_closed(case: &str, stack: &Stack, cause: Cause) {
    let limits = stack.limits();
    for _ in 0..3 {
        fire(case, stack, cause, || ()).await;
    }
    for circuit in &stack.circuits {
        let snapshot = circuit.snapshot();
        assert_eq!((snapshot.state, snapshot.opened), (CircuitState::Closed, 0), "{case}");
        assert_eq!(snapshot.seen.consecutive_failures, 0, "{case}");
    }
    assert_eq!(stack.limits(), limits, "{case}: the limit");
    stack.assert_probe_is_not_down(case);
}

async fn check_half_open(case: &str, stack: &Stack, cause: Cause) {
    let half_open = || {
        for circuit in &stack.circuits {
            circuit.half_open();
        }
    };
    fire(case, stack, cause, half_open).await;
    for circuit in &stack.circuits {
        let snapshot = circuit.snapshot();
        assert_ne!(snapshot.state, CircuitState::Open, "{case}: a probe");
        assert_eq!((snapshot.opened, snapshot.probes), (0, 0), "{case}: a probe");
    }
    // The next caller can probe at once.
    let target = Target::works().await;
    let result = stack.call(target.get("/")).await;
    assert!(causes::is_ok(&result), "{case}: the next caller got {result:?}");
    drop(result);
    for circuit in &stack.circuits {
        assert_eq!(circuit.state(), CircuitState::Closed, "{case}: after the next call");
    }
}

/// Calls a new upstream once, and then once more so that the cause happens.
async fn fire(case: &str, stack: &Stack, cause: Cause, before: impl FnOnce()) {
    let target = cause.target().await;
    let result = stack.call(target.get("/")).await;
    assert!(causes::is_ok(&result), "{case}: the first call got {result:?}");
    drop(result);
    stack.settle().await;
    before();
    let attempts = cause.fire(case, stack, &target).await;
    if cause.is_housekeeping() {
        assert_eq!(target.ended(), 1, "{case}: the connection did not end");
    }
    if let Some(attempts) = attempts.filter(|_| stack.retries) {
        let expected = if cause.is_housekeeping() { 2 } else { 1 };
        assert_eq!(attempts, expected, "{case}: attempts");
    }
    stack.settle().await;
}
