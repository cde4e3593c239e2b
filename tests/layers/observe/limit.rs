use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer, Deadline,
    limit::{
        adaptive::{Algorithm, ChangeReason, Knee, LimitChange, Sample},
        partition::{CallClass, Priority},
    },
    observe::Registry,
};
use http::Request;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, ServiceExt, util::Oneshot};

use super::Page;
use crate::support::{Strict, Watch, hello, ms, request, secs};

type Limit = ConcurrencyLimit<Strict>;
type Call = task::Spawn<Oneshot<Limit, Request<()>>>;

const WAITS: &str = "buttress_queue_wait_duration_seconds";

fn over(layer: ConcurrencyLimitLayer) -> (Registry, Limit, Watch) {
    let layer = layer.name("front");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let (inner, watch) = Strict::holding();
    (registry, layer.layer(inner), watch)
}

fn call(service: &Limit) -> Call {
    task::spawn(service.clone().oneshot(request()))
}

fn hold(service: &Limit) -> Call {
    let mut call = call(service);
    assert_pending!(call.poll());
    call
}

/// Returns the count and the sum of the waits with this result.
fn waits(page: &Page, result: &str) -> (f64, f64) {
    let labels = format!(r#"{{name="front",layer="concurrency_limit",result="{result}"}}"#);
    (page.get(&format!("{WAITS}_count{labels}")), page.get(&format!("{WAITS}_sum{labels}")))
}

fn rejected(page: &Page, reason: &str) -> f64 {
    let labels = format!(r#"{{name="front",layer="concurrency_limit",reason="{reason}"}}"#);
    page.get(&format!("buttress_rejections_total{labels}"))
}

fn changes(page: &Page, reason: &str) -> f64 {
    let labels = format!(r#"{{name="front",reason="{reason}"}}"#);
    page.get(&format!("buttress_concurrency_changes_total{labels}"))
}

#[tokio::test(start_paused = true)]
async fn unused_limit_has_every_reason_and_result() {
    let (registry, _service, _watch) = over(ConcurrencyLimitLayer::adaptive(Knee::default()));
    let page = Page::of(&registry);
    assert_eq!(
        page.labels("buttress_rejections_total", "reason"),
        ["deadline_passed", "limit_reached", "misconfigured", "outranked", "queue_timeout"]
    );
    assert_eq!(
        page.labels("buttress_concurrency_changes_total", "reason"),
        ["by_hand", "drain", "drained", "dropped", "headroom", "other", "queued", "slower"]
    );
    assert_eq!(
        page.labels(&format!("{WAITS}_count"), "result"),
        ["abandoned", "admitted", "rejected"]
    );
    assert_eq!(page.family(&format!("{WAITS}_bucket")).len(), 3 * 13);
    for metric in ["rejections_total", "shadow_rejections_total", "concurrency_changes_total"] {
        assert_eq!(page.sum(&format!("buttress_{metric}")), 0.0, "{metric}");
    }
    assert_eq!(page.sum(&format!("{WAITS}_bucket")), 0.0);
    assert_eq!(page.get(r#"buttress_concurrency_usage{name="front"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_total{name="front"}"#), 0.0);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_active{name="front"}"#), 0.0);
    assert_eq!(page.sum("buttress_queue_depth"), 0.0);
    assert_eq!(page.sum("buttress_queue_limit"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn call_that_waits_is_in_the_depth_and_its_wait_in_the_histogram() {
    let (registry, service, watch) = over(ConcurrencyLimitLayer::new(2).queue(1, secs(1)));
    let (mut first, _second) = (hold(&service), hold(&service));
    let mut queued = hold(&service);
    assert_ready_err!(call(&service).poll());
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_concurrency_limit{name="front"}"#), 2.0);
    assert_eq!(page.get(r#"buttress_concurrency_usage{name="front"}"#), 2.0);
    let layer = r#"{name="front",layer="concurrency_limit"}"#;
    assert_eq!(page.get(&format!("buttress_queue_depth{layer}")), 1.0);
    assert_eq!(page.get(&format!("buttress_queue_limit{layer}")), 1.0);
    assert_eq!(rejected(&page, "limit_reached"), 1.0);
    assert_eq!(page.sum("buttress_rejections_total"), 1.0);
    // A call that need not wait adds nothing, and neither does one that still waits.
    assert_eq!(page.sum(&format!("{WAITS}_count")), 0.0);

    advance(ms(300)).await;
    watch.end(0, Ok(hello()));
    drop(assert_ready_ok!(first.poll()));
    assert_pending!(queued.poll());
    let page = Page::of(&registry);
    assert_eq!(waits(&page, "admitted"), (1.0, 0.3));
    let bucket = |le: &str| {
        let labels =
            format!(r#"{{name="front",layer="concurrency_limit",result="admitted",le="{le}"}}"#);
        page.get(&format!("{WAITS}_bucket{labels}"))
    };
    assert_eq!((bucket("0.25"), bucket("0.5"), bucket("+Inf")), (0.0, 1.0, 1.0));
    assert_eq!(page.sum(&format!("{WAITS}_count")), 1.0);
    assert_eq!(page.get(&format!("buttress_queue_depth{layer}")), 0.0);
    // The call has received its permit and is in flight: its end adds nothing.
    drop(queued);
    assert_eq!(Page::of(&registry).sum(&format!("{WAITS}_count")), 1.0);
}

#[tokio::test(start_paused = true)]
async fn each_wait_ends_with_one_result() {
    let (registry, service, _watch) = over(ConcurrencyLimitLayer::new(1).queue(5, ms(200)));
    let _holds = hold(&service);
    let mut waits_too_long = hold(&service);
    let abandoned = hold(&service);
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(ms(50)));
    let mut late = task::spawn(service.clone().oneshot(late));
    assert_pending!(late.poll());
    advance(ms(60)).await;
    assert_ready_err!(late.poll());
    drop(abandoned);
    advance(ms(140)).await;
    assert!(waits_too_long.is_woken());
    assert_ready_err!(waits_too_long.poll());
    drop((late, waits_too_long));
    let page = Page::of(&registry);
    assert_eq!((rejected(&page, "queue_timeout"), rejected(&page, "deadline_passed")), (1.0, 1.0));
    assert_eq!(waits(&page, "admitted"), (0.0, 0.0));
    assert_eq!(waits(&page, "rejected"), (2.0, 0.26));
    assert_eq!(waits(&page, "abandoned"), (1.0, 0.06));
}

#[tokio::test(start_paused = true)]
async fn displaced_wait_is_rejected() {
    let layer = ConcurrencyLimitLayer::new(1).queue(1, secs(1)).name("front");
    let layer = layer
        .classify_by(|request: &Request<()>| {
            let priority = request.extensions().get().copied().unwrap_or(Priority::NORMAL);
            CallClass::default().priority(priority)
        })
        .reject_by_priority();
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let (inner, _watch) = Strict::holding();
    let service = layer.layer(inner);
    let call = |priority: u8| {
        let mut request = request();
        request.extensions_mut().insert(Priority::new(priority));
        task::spawn(service.clone().oneshot(request))
    };
    let (mut holds, mut low, mut high) = (call(2), call(2), call(6));
    assert_pending!(holds.poll());
    assert_pending!(low.poll());
    advance(ms(20)).await;
    assert_pending!(high.poll());
    assert_ready_err!(low.poll());
    drop(low);
    let page = Page::of(&registry);
    assert_eq!((rejected(&page, "outranked"), waits(&page, "rejected")), (1.0, (1.0, 0.02)));
    assert_eq!(waits(&page, "abandoned"), (0.0, 0.0));
    assert_eq!(page.sum("buttress_queue_depth"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn shadow_rejections_are_separate() {
    let (registry, service, _watch) =
        over(ConcurrencyLimitLayer::new(1).queue(3, secs(1)).shadow());
    let _calls = [hold(&service), hold(&service), hold(&service)];
    let page = Page::of(&registry);
    let layer = r#"{name="front",layer="concurrency_limit"}"#;
    assert_eq!(page.get(&format!("buttress_shadow_rejections_total{layer}")), 2.0);
    assert_eq!(page.sum("buttress_rejections_total"), 0.0);
    // No call waits in shadow mode.
    assert_eq!(page.get(&format!("buttress_queue_limit{layer}")), 0.0);
}

#[tokio::test(start_paused = true)]
async fn exempt_calls_are_no_usage() {
    let layer = ConcurrencyLimitLayer::new(1).name("front").exempt_paths(["/"]);
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    let mut call = task::spawn(service.oneshot(request()));
    assert_pending!(call.poll());
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_total{name="front"}"#), 1.0);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_active{name="front"}"#), 1.0);
    assert_eq!(page.get(r#"buttress_concurrency_usage{name="front"}"#), 0.0);
    watch.end(0, Ok(hello()));
    drop(assert_ready!(call.poll()));
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_total{name="front"}"#), 1.0);
    assert_eq!(page.get(r#"buttress_concurrency_exempt_active{name="front"}"#), 0.0);
}

/// Raises the limit by 1 with each sample.
#[derive(Clone, Debug)]
struct Raise(u32);

impl Algorithm for Raise {
    fn limit(&self) -> u32 {
        self.0
    }

    fn set_limit(&mut self, limit: u32) {
        self.0 = limit;
    }

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        self.0 += 1;
        let reason =
            if sample.dropped { ChangeReason::Dropped } else { ChangeReason::Other("my reason") };
        Some(LimitChange { limit: self.0, reason })
    }
}

#[tokio::test(start_paused = true)]
async fn changes_count_by_reason_and_reasons_of_the_application_are_other() {
    let (registry, service, watch) = over(ConcurrencyLimitLayer::adaptive(Raise(5)));
    for nth in 0..3 {
        let mut call = hold(&service);
        watch.end(nth, Ok(if nth == 0 { crate::support::status(503) } else { hello() }));
        drop(assert_ready_ok!(call.poll()));
    }
    let page = Page::of(&registry);
    assert_eq!((changes(&page, "dropped"), changes(&page, "other")), (1.0, 2.0));
    assert_eq!(page.sum("buttress_concurrency_changes_total"), 3.0);
    assert_eq!(page.get(r#"buttress_concurrency_limit{name="front"}"#), 8.0);
    assert!(!page.contains("my reason"));
}

#[tokio::test(start_paused = true)]
async fn limit_set_by_hand_is_a_change_of_an_adaptive_limit_only() {
    let registry = Registry::new();
    let adaptive = ConcurrencyLimitLayer::adaptive(Knee::default()).name("front");
    let fixed = ConcurrencyLimitLayer::new(5).name("fixed");
    for handle in [adaptive.handle(), fixed.handle()] {
        registry.watch(&handle).unwrap();
        handle.set_limit(7).unwrap();
    }
    let page = Page::of(&registry);
    assert_eq!(changes(&page, "by_hand"), 1.0);
    assert_eq!(page.family("buttress_concurrency_changes_total").len(), 8);
    assert_eq!(page.get(r#"buttress_concurrency_limit{name="fixed"}"#), 7.0);
}

#[tokio::test(start_paused = true)]
async fn series_of_a_limit_remain_until_its_last_service_is_dropped() {
    let (registry, service, _watch) = over(ConcurrencyLimitLayer::new(2));
    let _call = hold(&service);
    assert_eq!(Page::of(&registry).get(r#"buttress_concurrency_usage{name="front"}"#), 1.0);
    drop(service);
    assert!(!Page::of(&registry).contains("front"));
}
