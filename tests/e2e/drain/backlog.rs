//! Connections that are on their way when *stopping* begins.

use std::{io::Write, time::Duration};

use buttress::lifecycle::LifecyclePhase;
use tokio::net::TcpStream;

use super::server::Server;
use crate::support::net::{raw::Client, soon};

/// On one thread, so that the server cannot accept before the drain has begun.
#[tokio::test]
async fn connection_in_the_backlog_is_served() {
    let Server { addr, lifecycle, task, .. } = Server::start(Duration::ZERO).await;
    let mut queued = Vec::new();
    for _ in 0..50 {
        let mut tcp = std::net::TcpStream::connect(addr).unwrap();
        tcp.write_all(b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        tcp.set_nonblocking(true).unwrap();
        queued.push(tcp);
    }
    lifecycle.drain();
    assert_eq!(lifecycle.phase(), LifecyclePhase::Stopping);
    for tcp in queued {
        let mut client = Client(TcpStream::from_std(tcp).unwrap());
        assert!(client.receive("quick").await.contains("connection: close"));
    }
    let drained = soon(task).await.unwrap();
    assert_eq!((drained.cut_connections, drained.rejected), (0, 0));
    assert!(TcpStream::connect(addr).await.is_err());
}
