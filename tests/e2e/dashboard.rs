//! The live page over sockets: the address of the peer, HTTP/2, and a drain with an open page.

use std::{net::SocketAddr, time::Duration};

use axum::{Extension, Router, extract::ConnectInfo};
use buttress::{Health, Lifecycle, observe::Registry};
use http::StatusCode;
use tokio::time::Instant;

use crate::support::net::{listener, soon};

#[tokio::test]
async fn axum_server_with_connect_info_serves_loopback_peers() {
    let dashboard = Registry::new().dashboard().loopback().layer().unwrap();
    let app: Router = Router::new().layer(dashboard);
    let (listener, address) = listener().await;
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, app).await });
    let http2 = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    for client in [reqwest::Client::new(), http2] {
        let get = |path: &str| client.get(format!("http://{address}{path}"));
        // The client follows the redirect.
        let page = soon(get("/buttress").send()).await.unwrap();
        assert_eq!((page.status(), page.url().path()), (StatusCode::OK, "/buttress/"));
        assert!(page.text().await.unwrap().starts_with("<!doctype html>"));
        let proxied = get("/buttress/").header("x-forwarded-for", "10.0.0.7");
        assert_eq!(soon(proxied.send()).await.unwrap().status(), StatusCode::FORBIDDEN);
        let mut events = soon(get("/buttress/events").send()).await.unwrap();
        let first = soon(events.chunk()).await.unwrap().unwrap();
        assert!(first.starts_with(b"retry: 1000\n\nevent: snapshot\n"));
        let second = soon(events.chunk()).await.unwrap().unwrap();
        assert!(second.starts_with(b"event: tick\n"));
    }
    let rebound = reqwest::Client::new().get(format!("http://{address}/buttress/"));
    let rebound = rebound.header("host", "evil.example").send();
    assert_eq!(soon(rebound).await.unwrap().status(), StatusCode::MISDIRECTED_REQUEST);
}

#[tokio::test]
async fn open_page_does_not_hold_the_drain() {
    let (registry, health) = (Registry::new(), Health::new());
    let lifecycle = Lifecycle::without_signals(&health)
        .unwrap()
        .drain_delay(Duration::ZERO)
        .grace(Duration::from_millis(100));
    registry.watch(&lifecycle).unwrap();
    let app: Router = Router::new().layer(registry.dashboard().loopback().layer().unwrap());
    let (listener, address) = listener().await;
    let server = lifecycle.clone();
    let server = tokio::spawn(async move {
        server
            .serve_each(listener, move |peer| app.clone().layer(Extension(ConnectInfo(peer))))
            .await
    });
    lifecycle.ready();
    let http2 = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
    let mut streams = Vec::new();
    for client in [reqwest::Client::new(), http2] {
        let request = client.get(format!("http://{address}/buttress/events"));
        let mut stream = soon(request.send()).await.unwrap();
        soon(stream.chunk()).await.unwrap().unwrap();
        streams.push(stream);
    }
    let start = Instant::now();
    lifecycle.drain();
    for mut stream in streams {
        // The stream ends in order.
        while soon(stream.chunk()).await.unwrap().is_some() {}
    }
    let drained = soon(server).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!((drained.cut_calls, drained.cut_connections), (0, 0));
}
