use std::{convert::Infallible, time::Duration};

use buttress::{Health, Lifecycle, observe::Registry};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, ServiceExt, service_fn};

use super::Page;
use crate::support::{secs, settle};

type Body = Full<Bytes>;

fn phase(registry: &Registry) -> String {
    let page = Page::of(registry);
    assert_eq!(page.sum("buttress_lifecycle_phase"), 1.0);
    let phases = page.family("buttress_lifecycle_phase");
    let now = phases.iter().find(|(_, value)| *value == 1.0).unwrap();
    now.0.rsplit('=').next().unwrap().trim_matches(['"', '}']).to_owned()
}

#[tokio::test(start_paused = true)]
async fn phase_calls_and_rejections_are_exported_without_a_name() {
    let (registry, health) = (Registry::new(), Health::new());
    let lifecycle = Lifecycle::without_signals(&health).unwrap();
    let lifecycle = lifecycle.drain_delay(secs(5)).grace(Duration::ZERO).drain_timeout(secs(20));
    registry.watch(&lifecycle).unwrap();
    registry.watch(&lifecycle).unwrap_err();
    registry.watch(&health).unwrap();
    let page = Page::of(&registry);
    assert_eq!(
        page.labels("buttress_lifecycle_phase", "phase"),
        ["draining", "ready", "starting", "stopped", "stopping"]
    );
    assert_eq!(phase(&registry), "starting");
    assert_eq!(page.get("buttress_lifecycle_active"), 0.0);
    let rejected = r#"buttress_rejections_total{layer="lifecycle",reason="shutting_down"}"#;
    assert_eq!(page.get(rejected), 0.0);
    let check = r#"buttress_health_check_state{check="lifecycle",critical="true",state="pass"}"#;
    assert_eq!(page.get(check), 0.0);

    lifecycle.ready();
    assert_eq!(phase(&registry), "ready");
    assert_eq!(Page::of(&registry).get(check), 1.0);
    let service = lifecycle.layer().layer(service_fn(|_: Request<Body>| async {
        Ok::<_, Infallible>(Response::new(Body::from("hello")))
    }));
    let response = service.clone().oneshot(Request::default()).await.unwrap();
    assert_eq!(Page::of(&registry).get("buttress_lifecycle_active"), 1.0);
    lifecycle.drain();
    assert_eq!(phase(&registry), "draining");
    assert_eq!(Page::of(&registry).get("buttress_health_ready"), 0.0);
    lifecycle.skip_delay();
    assert_eq!(phase(&registry), "stopping");
    let _ = service.clone().oneshot(Request::default()).await;
    assert_eq!(Page::of(&registry).get(rejected), 1.0);
    drop(response);
    assert_eq!(Page::of(&registry).get("buttress_lifecycle_active"), 0.0);
    lifecycle.skip_delay();
    assert_eq!(phase(&registry), "stopped");

    drop((lifecycle, service));
    settle().await;
    let page = Page::of(&registry);
    assert!(!page.contains("buttress_lifecycle") && !page.contains("\"lifecycle\""));
}
