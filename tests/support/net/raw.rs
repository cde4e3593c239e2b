//! A client that sends and receives bytes.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::soon;

/// A connection of HTTP/1.
pub struct Client(pub TcpStream);

impl Client {
    pub async fn connect(addr: SocketAddr) -> Self {
        Self(TcpStream::connect(addr).await.unwrap())
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Receives until the received bytes contain this.
    pub async fn receive(&mut self, expected: &str) -> String {
        let mut received = Vec::new();
        while !String::from_utf8_lossy(&received).contains(expected) {
            let bytes = soon(self.0.read_buf(&mut received)).await.unwrap();
            assert!(bytes > 0, "closed after {:?}", String::from_utf8_lossy(&received));
        }
        String::from_utf8(received).unwrap()
    }

    /// Waits for the server to close the connection.
    pub async fn is_closed(&mut self) {
        let read = soon(self.0.read(&mut [0; 16])).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }

    pub async fn is_open_for(&mut self, time: Duration) {
        let read = timeout(time, self.0.read(&mut [0; 16])).await;
        assert!(read.is_err(), "{read:?}");
    }
}
