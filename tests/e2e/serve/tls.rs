//! Connections over TLS: ALPN, the time limit of the handshake, and the other limits.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{PrivateKeyDer, ServerName},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;

struct Tls {
    served: Served,
    roots: Arc<RootCertStore>,
}

impl Tls {
    async fn serve(set: impl FnOnce(Server) -> Server) -> Self {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(own.cert.der().clone()).unwrap();
        let served = serve(|server| set(server.tls(Arc::new(config)))).await;
        Self { served, roots: Arc::new(roots) }
    }

    async fn connect(&self, alpn: &[&str]) -> TlsStream<TcpStream> {
        let mut config = ClientConfig::builder()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let name = ServerName::try_from("localhost").unwrap();
        let tcp = connect(self.served.addr).await;
        soon(TlsConnector::from(Arc::new(config)).connect(name, tcp)).await.unwrap()
    }
}

#[tokio::test]
async fn alpn_picks_http2_or_http1() {
    let tls = Tls::serve(|server| server).await;
    let stream = tls.connect(&["h2", "http/1.1"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut send, connection) = soon(h2::client::handshake(stream)).await.unwrap();
    tokio::spawn(connection);
    let (response, _) = send.send_request(net::get(tls.served.addr, "/").map(drop), true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), "hello");

    for alpn in [&["http/1.1"][..], &[]] {
        let mut stream = tls.connect(alpn).await;
        let chosen = alpn.first().map(|name| name.as_bytes());
        assert_eq!(stream.get_ref().1.alpn_protocol(), chosen);
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut read = String::new();
        soon(stream.read_to_string(&mut read)).await.unwrap();
        assert!(read.starts_with("HTTP/1.1 200") && read.ends_with("hello"), "{read}");
    }
}

#[tokio::test]
async fn connection_without_a_handshake_ends_in_time_and_blocks_no_other() {
    let limit = ms(500);
    let tls = Tls::serve(|server| server.head_timeout(limit)).await;
    let mut silent = Vec::new();
    // Nothing, half a record, and a request without TLS, which ends at once.
    for sent in [&b""[..], &[22, 3, 1, 2, 0, 1], b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let mut tcp = connect(tls.served.addr).await;
        tcp.write_all(sent).await.unwrap();
        silent.push(tcp);
    }
    let began = Instant::now();
    drop(tls.connect(&["h2"]).await);
    assert!(began.elapsed() < limit, "the handshake of another client waits");
    for tcp in &mut silent {
        time_to_close(tcp).await;
    }
    assert!(began.elapsed() < 3 * limit);
}

/// The handshake and the head have one limit together, and the other limits hold over TLS as well.
#[tokio::test]
async fn limits_apply_over_tls() {
    let limit = ms(500);
    let tls = Tls::serve(|server| server.head_timeout(limit).write_timeout(limit)).await;
    let began = Instant::now();
    let mut stream = tls.connect(&["http/1.1"]).await;
    stream.write_all(b"GET / HT").await.unwrap();
    let _ = soon(stream.read_to_end(&mut Vec::new())).await;
    assert!(began.elapsed() + ms(50) >= limit && began.elapsed() < 4 * limit);

    let mut stream = tls.connect(&["http/1.1"]).await;
    stream.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    net::until(|| tls.served.calls.in_flight() == 1).await;
    let began = Instant::now();
    net::until(|| tls.served.calls.in_flight() == 0).await;
    assert!(began.elapsed() < 6 * limit);
}
