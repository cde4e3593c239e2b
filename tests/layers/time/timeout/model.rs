//! Random streams, readers and timeouts: the layer cuts a stream exactly when the model does.

use std::sync::{Arc, Mutex};

use buttress::{TimeoutLayer, Timeouts, timeout::TimeoutPhase};
use http::Response;
use http_body_util::BodyExt;
use proptest::prelude::*;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt};

use crate::layers::time::fixtures::*;
use crate::support::fuzz::cases;

/// A stream, its reader and the timeouts. All times are in milliseconds.
#[derive(Clone, Debug)]
struct Case {
    /// The time at which each frame is available, from the head.
    frames: Vec<u64>,
    ends: bool,
    /// The pauses of the reader before it polls for each frame and for the end.
    pauses: Vec<u64>,
    first: Option<u64>,
    idle: Option<u64>,
    total: Option<u64>,
}

fn case() -> impl Strategy<Value = Case> {
    let time = || prop::option::of(1u64..60);
    let gaps = prop::collection::vec((0u64..40, prop_oneof![2 => Just(0), 1 => 0u64..80]), 0..12);
    (gaps, any::<bool>(), time(), time(), prop::option::of(1u64..300)).prop_map(
        |(gaps, ends, first, idle, total)| {
            let mut at = 0;
            let frames = gaps.iter().map(|(gap, _)| {
                at += gap;
                at
            });
            let frames = frames.collect();
            let pauses = gaps.iter().map(|(_, pause)| *pause).chain([3]).collect();
            Case { frames, ends, pauses, first, idle, total }
        },
    )
}

/// The number of frames, the time of the end, and the phase that ended the stream. `None` if it does not end.
type End = Option<(usize, u64, Option<TimeoutPhase>)>;

fn expected(case: &Case) -> End {
    let mut now = 0;
    if case.ends && case.frames.is_empty() {
        return Some((0, case.pauses[0], None));
    }
    for (nth, pause) in case.pauses.iter().enumerate() {
        now += pause;
        let there = case.frames.get(nth).copied();
        let is_last = case.ends && nth + 1 >= case.frames.len();
        if there.is_none() && case.ends {
            return Some((nth, now, None));
        }
        let silence = if nth == 0 {
            (case.first, TimeoutPhase::FirstFrame)
        } else {
            (case.idle, TimeoutPhase::Idle)
        };
        let silence = silence.0.map(|limit| (now + limit, silence.1));
        let total = case.total.map(|total| (total.max(now), TimeoutPhase::Total));
        let end = match (silence, total) {
            (Some(silence), Some(total)) if silence.0 < total.0 => Some(silence),
            (silence, total) => total.or(silence),
        };
        match (there.map(|there| there.max(now)), end) {
            (Some(there), Some((end, by))) if end < there => return Some((nth, end, Some(by))),
            (Some(there), _) if !is_last && case.total.is_some_and(|total| total <= there) => {
                return Some((nth, there, Some(TimeoutPhase::Total)));
            }
            (Some(there), _) => now = there,
            (None, Some((end, by))) => return Some((nth, end, Some(by))),
            (None, None) => return None,
        }
    }
    unreachable!("the last pause is before the end")
}

async fn seen(case: &Case) -> End {
    let with = |time: Option<u64>| time.map(ms);
    let timeouts = Timeouts::new().first_frame(with(case.first)).response_idle(with(case.idle));
    let layer = TimeoutLayer::new(timeouts.total(with(case.total)));
    let start = Instant::now();
    let body = Paced::at(case.frames.iter().map(|at| ms(*at)));
    let body = Arc::new(Mutex::new(Some(if case.ends { body } else { body.then_silent() })));
    let service = layer.layer(tower::service_fn(move |_: http::Request<_>| {
        let body = body.lock().unwrap().take().expect("called once");
        async move { Ok::<_, buttress::BoxError>(Response::new(body)) }
    }));
    let reading = async {
        let mut body = service.oneshot(request()).await.unwrap().into_body();
        let mut pauses = case.pauses.iter();
        let mut frames = 0;
        loop {
            sleep(ms(*pauses.next().unwrap())).await;
            match body.frame().await {
                Some(Ok(_)) => frames += 1,
                Some(Err(error)) => return (frames, Some(phase_of(&error))),
                None => return (frames, None),
            }
        }
    };
    let ended = tokio::time::timeout(secs(3600), reading).await.ok();
    ended.map(|(frames, by)| (frames, start.elapsed().as_millis() as u64, by))
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn a_stream_is_cut_off_as_in_the_model(case in case()) {
        let builder = &mut tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        prop_assert_eq!(runtime.block_on(seen(&case)), expected(&case));
    }
}
