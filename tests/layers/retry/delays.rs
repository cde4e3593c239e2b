//! Delays: the backoff and the hints of servers.

use std::time::{Duration, SystemTime};

use buttress::{Attempts, Backoff, RetryLayer, retry::GiveUpReason};
use tokio::time::Instant;
use tower::Layer;

use super::fixtures::*;

/// Returns the time between two attempts, and the record of the call.
async fn wait_for(layer: RetryLayer, code: u16, headers: http::HeaderMap) -> (Duration, Attempts) {
    let inner: Inner = Inner::new(move |n| {
        let mut response = status(if n == 1 { code } else { 200 });
        *response.headers_mut() = headers.clone();
        Ok(response)
    });
    let start = Instant::now();
    let response = send(&layer.layer(inner), get()).await.unwrap();
    (start.elapsed(), Attempts::of(&response))
}

fn layer() -> RetryLayer {
    RetryLayer::http().without_budget()
}

#[tokio::test(start_paused = true)]
async fn full_jitter_is_drawn_from_zero_to_the_cap() {
    let mut waits = Vec::new();
    for _ in 0..400 {
        let backoff = Backoff::exponential(ms(1000));
        let (took, told) = wait_for(layer().backoff(backoff), 503, map(&[])).await;
        assert!(told.waited <= ms(1000), "{told:?}");
        // Timers have a resolution of one millisecond.
        assert!(took >= told.waited && took <= told.waited + ms(2), "{took:?} {told:?}");
        waits.push(told.waited);
    }
    // The distribution is uniform: each quarter has about 100 of 400 delays. The probability of a count outside the
    // bounds is below 10⁻⁹.
    for quarter in 0..4 {
        let range = ms(250 * quarter)..ms(250 * (quarter + 1));
        let count = waits.iter().filter(|wait| range.contains(*wait)).count();
        assert!((45..=160).contains(&count), "{count} in {range:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_nth_delay_grows_up_to_its_maximum() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let backoff = Backoff::exponential(ms(100)).factor(3.0).max(ms(500)).without_jitter();
    let service = layer().attempts(5).backoff(backoff).layer(inner);
    let start = Instant::now();
    let response = send(&service, get()).await.unwrap();
    let expected = ms(100 + 300 + 500 + 500);
    assert_eq!(Attempts::of(&response).waited, expected);
    assert!(start.elapsed() >= expected && start.elapsed() < expected + ms(8));
}

// ===== Hints =====

#[tokio::test(start_paused = true)]
async fn retry_after_is_a_lower_bound_with_jitter_upward() {
    for code in [408, 425, 429, 502, 503, 504] {
        let mut beyond = 0;
        for _ in 0..40 {
            let (took, told) = wait_for(layer(), code, map(&[("retry-after", "4")])).await;
            assert!(told.waited >= ms(4000) && told.waited <= ms(9000), "{code} {told:?}");
            assert!(took >= ms(4000), "{code} {took:?}");
            beyond += u32::from(told.waited > ms(4100));
        }
        assert!(beyond > 20, "{code}: the jitter is random");
    }
    // A hint below the backoff: the delay has the jitter of the backoff.
    let backoff = Backoff::exponential(ms(800));
    for _ in 0..40 {
        let (_, told) = wait_for(layer().backoff(backoff), 503, map(&[("retry-after", "0")])).await;
        assert!(told.waited <= ms(800));
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_as_a_date_counts_from_the_date_of_the_response() {
    for date in [
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
    ] {
        let headers = [("retry-after", date), ("date", "Sun, 06 Nov 1994 08:49:27 GMT")];
        let (_, told) = wait_for(layer(), 503, map(&headers)).await;
        assert!(told.waited >= ms(10_000) && told.waited <= ms(15_000), "{date} {told:?}");
    }
    // Without a `date` header, the clock of the client applies.
    let mut headers = map(&[]);
    let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(20));
    headers.insert("retry-after", soon.parse().unwrap());
    let (_, told) = wait_for(layer(), 503, headers).await;
    assert!(told.waited >= ms(18_000) && told.waited <= ms(30_000), "{told:?}");
    // A date in the past requires no delay.
    let past = [("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")];
    let (_, told) = wait_for(layer(), 503, map(&past)).await;
    assert!(told.waited <= ms(50));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_retry_after_is_ignored() {
    let long = "9".repeat(10_000);
    for text in
        ["-1", "1.", "soon", "", "12s", "0x10", "1e3", "Sun, 99 Nov 1994 08:49:37 GMT", "\u{661}"]
    {
        let mut headers = map(&[]);
        headers.insert("retry-after", http::HeaderValue::from_bytes(text.as_bytes()).unwrap());
        let (_, told) = wait_for(layer(), 503, headers).await;
        assert!(told.made == 2 && told.waited <= ms(50), "{text:?} {told:?}");
    }
    // An absurdly large number is a long delay.
    let mut headers = map(&[]);
    headers.insert("retry-after", long.parse().unwrap());
    let (took, told) = wait_for(layer(), 503, headers).await;
    assert_eq!((took, told.made, told.stop), (Duration::ZERO, 1, GiveUpReason::DelayTooLong));
}

#[tokio::test(start_paused = true)]
async fn hint_above_the_maximum_wait_ends_the_call() {
    let hint = |text: &'static str| map(&[("retry-after", text)]);
    let (took, told) = wait_for(layer(), 429, hint("31")).await;
    assert_eq!((took, told.made, told.stop), (Duration::ZERO, 1, GiveUpReason::DelayTooLong));
    let (_, told) = wait_for(layer(), 429, hint("30")).await;
    assert_eq!(told.made, 2);
    let short = layer().max_wait(ms(2500));
    for _ in 0..20 {
        let (_, told) = wait_for(short.clone(), 503, hint("2")).await;
        assert!(
            told.waited >= ms(2000) && told.waited <= ms(3000),
            "jitter above the hint: {told:?}"
        );
    }
    let (_, told) = wait_for(short.clone(), 503, hint("3")).await;
    assert_eq!(told.stop, GiveUpReason::DelayTooLong);
    // The backoff is cut to the maximum.
    let backoff = Backoff::constant(Duration::from_secs(60)).without_jitter();
    let (took, told) = wait_for(short.backoff(backoff), 503, map(&[])).await;
    assert_eq!(told.waited, ms(2500));
    assert!(took >= ms(2500) && took < ms(2503));
}

/// smithy-v21-retryafter-01 to -03: the delay is within `[t, t + 5 s]`.
#[tokio::test(start_paused = true)]
async fn a_hint_can_be_bounded_by_the_backoff() {
    let base = Backoff::constant(ms(50)).without_jitter();
    let layer = layer().max_hint_extension(Duration::from_secs(5)).backoff(base);
    for (text, waited) in [("3", 3000), ("0", 50), ("10", 5050), ("400", 5050)] {
        let (_, told) = wait_for(layer.clone(), 503, map(&[("retry-after", text)])).await;
        assert_eq!((told.made, told.waited), (2, ms(waited)), "{text}");
    }
}

/// No setting makes the arithmetic of times panic.
#[tokio::test(start_paused = true)]
async fn extreme_settings_do_not_panic() {
    for backoff in
        [Backoff::constant(Duration::MAX), Backoff::exponential(Duration::MAX).factor(f64::MAX)]
    {
        for headers in [map(&[]), map(&[("retry-after", "299")])] {
            for backoff in [backoff, backoff.without_jitter()] {
                let headers = headers.clone();
                let layer = layer().backoff(backoff).max_wait(Duration::MAX);
                let inner: Inner = Inner::new(move |_| {
                    let mut response = status(503);
                    *response.headers_mut() = headers.clone();
                    Ok(response)
                });
                let service = layer.layer(inner);
                let waiting = tokio::time::timeout(Duration::from_secs(400), send(&service, get()));
                assert!(waiting.await.is_err(), "the delay does not end");
            }
        }
    }
}

/// Retries without a delay of attempts that fail immediately would otherwise block the thread, and with it an outer
/// timeout.
#[test]
fn retries_without_a_delay_let_other_tasks_run() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let log = inner.log.clone();
    let layer = RetryLayer::http().attempts(10_000).backoff(Backoff::constant(ms(0)));
    let service = layer.without_budget().layer(inner);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _inside = runtime.enter();
    let mut call = tokio_test::task::spawn(send(&service, get()));
    tokio_test::assert_pending!(call.poll());
    assert!(call.is_woken() && log.calls() < 100, "{} calls in one poll", log.calls());
    while call.poll().is_pending() {
        assert!(call.is_woken(), "the call wakes itself");
    }
    assert_eq!(log.calls(), 10_000);
}
