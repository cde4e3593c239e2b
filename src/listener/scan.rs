//! Scanners that determine whether the bytes that a client has sent so far end in the middle of a head.
//!
//! hyper does not report how much of a head it has read. These scanners therefore read the bytes before hyper does.
//! They do not validate the bytes, because hyper rejects invalid ones.

/// The connection preface of HTTP/2 (RFC 9113 §3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The first byte of a TLS handshake record.
pub(super) const TLS_HANDSHAKE: u8 = 22;

// ===== The preface =====

/// Compares the first bytes of a connection with the preface of HTTP/2.
#[derive(Debug, Default)]
pub(crate) struct Preface {
    /// The number of bytes read so far, all equal to the beginning of the preface.
    matched: usize,
}

/// The result of a comparison.
pub(crate) enum PrefaceMatch<'a> {
    /// All bytes so far are equal.
    Partial,
    /// The preface is complete, and these bytes follow it.
    Complete(&'a [u8]),
    /// A byte differs. `matched` is the number of bytes of earlier reads.
    Differs { matched: usize },
}

impl Preface {
    /// Reads the next bytes.
    pub(crate) fn scan<'a>(&mut self, bytes: &'a [u8]) -> PrefaceMatch<'a> {
        let next = &PREFACE[self.matched..];
        let equal = next.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        if equal == next.len() {
            PrefaceMatch::Complete(&bytes[equal..])
        } else if equal == bytes.len() {
            self.matched += equal;
            PrefaceMatch::Partial
        } else {
            PrefaceMatch::Differs { matched: self.matched }
        }
    }
}

// ===== HTTP/2 frames =====

const FRAME_HEAD: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// Follows the frames of an HTTP/2 client, from the end of the preface on (RFC 9113 §4.1).
#[derive(Debug)]
pub(crate) struct Frames {
    /// The head of the current frame. The first `head_len` bytes have been read.
    head: [u8; FRAME_HEAD],
    head_len: usize,
    /// The number of bytes of the payload that have not been read.
    payload_left: usize,
    /// The scanner is inside a frame other than DATA, whose end must follow soon. The limits of request bodies cover
    /// the time of DATA frames.
    in_frame: bool,
    /// HEADERS without END_HEADERS was read. Only CONTINUATION may follow until the end of the header block (RFC 9113
    /// §6.10).
    in_block: bool,
    /// The first frame, which completes the preface, has not been read.
    is_first: bool,
}

/// The contents of a read of HTTP/2 frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// The read contains a frame of a request. A client may send any other frame on a connection that it does not use.
    pub(crate) is_in_use: bool,
    /// The read contains the end of a frame outside of a header block.
    pub(crate) has_ended_head: bool,
    /// The read contains the frame head of an acknowledgement of a PING.
    pub(crate) has_ping_ack: bool,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            head: [0; FRAME_HEAD],
            head_len: 0,
            payload_left: 0,
            in_frame: false,
            in_block: false,
            is_first: true,
        }
    }
}

impl Frames {
    /// Reads the next bytes.
    pub(crate) fn scan(&mut self, mut bytes: &[u8]) -> Scanned {
        let mut scanned = Scanned::default();
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let skipped = self.payload_left.min(bytes.len());
                self.payload_left -= skipped;
                bytes = &bytes[skipped..];
                scanned.has_ended_head |= self.end_frame_if_complete();
                continue;
            }
            let read = (FRAME_HEAD - self.head_len).min(bytes.len());
            self.head[self.head_len..self.head_len + read].copy_from_slice(&bytes[..read]);
            self.head_len += read;
            bytes = &bytes[read..];
            if self.head_len < FRAME_HEAD {
                break;
            }
            self.head_len = 0;
            let [a, b, c, kind, flags, ..] = self.head;
            self.payload_left = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            self.in_frame = kind != DATA;
            if matches!(kind, HEADERS | CONTINUATION) {
                self.in_block = flags & END_HEADERS == 0;
            }
            scanned.is_in_use |= matches!(kind, DATA | HEADERS | CONTINUATION);
            scanned.has_ping_ack |= kind == PING && flags & ACK != 0;
            scanned.has_ended_head |= self.end_frame_if_complete();
        }
        scanned
    }

    /// Ends the frame if its payload has been read. Returns whether it has ended outside of a header block.
    fn end_frame_if_complete(&mut self) -> bool {
        if self.payload_left > 0 {
            return false;
        }
        self.in_frame = false;
        self.is_first = false;
        !self.in_block
    }

    /// Returns whether the rest of a frame or of a header block is missing.
    #[inline]
    pub(crate) fn is_mid_head(&self) -> bool {
        self.in_frame || self.in_block || self.is_first || self.head_len > 0
    }
}

// ===== The first head =====

/// Finds the end of the first request head of a connection: the empty line of HTTP/1, or the end of the first frame
/// after the preface of HTTP/2. TLS encrypts the head, so the first byte of a handshake counts as the end.
#[derive(Debug)]
pub(crate) enum FirstHead {
    /// The protocol is not known yet.
    Preface(Preface),
    Http1(Http1Line),
    Http2(Frames),
}

/// The line of an HTTP/1 head that is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Http1Line {
    /// Before the request line. A server ignores empty lines here (RFC 9112 §2.2).
    Before,
    Empty,
    Filled,
}

impl Default for FirstHead {
    fn default() -> Self {
        Self::Preface(Preface::default())
    }
}

impl FirstHead {
    /// Reads the next bytes. Returns whether the head is complete.
    pub(crate) fn scan(&mut self, mut bytes: &[u8]) -> bool {
        if let Self::Preface(preface) = self {
            if preface.matched == 0 && bytes.first() == Some(&TLS_HANDSHAKE) {
                return true;
            }
            match preface.scan(bytes) {
                PrefaceMatch::Partial => return false,
                PrefaceMatch::Complete(rest) => {
                    *self = Self::Http2(Frames::default());
                    bytes = rest;
                }
                PrefaceMatch::Differs { matched: 0 } => *self = Self::Http1(Http1Line::Before),
                PrefaceMatch::Differs { .. } => *self = Self::Http1(Http1Line::Filled),
            }
        }
        match self {
            Self::Preface(_) => false,
            Self::Http1(line) => {
                for byte in bytes {
                    *line = match (byte, *line) {
                        (b'\n', Http1Line::Empty) => return true,
                        (b'\n', Http1Line::Filled) => Http1Line::Empty,
                        (b'\r' | b'\n', line) => line,
                        _ => Http1Line::Filled,
                    };
                }
                false
            }
            Self::Http2(frames) => {
                frames.scan(bytes);
                !frames.is_mid_head()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: u8 = 4;

    fn frame(kind: u8, flags: u8, len: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, len, kind, flags, 0, 0, 0, 1];
        frame.resize(FRAME_HEAD + usize::from(len), 0xff);
        frame
    }

    fn after_settings() -> Frames {
        let mut frames = Frames::default();
        assert!(frames.is_mid_head(), "the first frame is part of the preface");
        assert!(!frames.scan(&frame(SETTINGS, 0, 0)).is_in_use);
        assert!(!frames.is_mid_head());
        frames
    }

    #[test]
    fn header_block_is_open_until_its_end_however_the_bytes_are_split() {
        let mut wire = frame(HEADERS, 0, 5);
        wire.extend(frame(CONTINUATION, 0, 0));
        wire.extend(frame(CONTINUATION, END_HEADERS, 3));
        for step in 1..=wire.len() {
            let mut frames = after_settings();
            let mut read = 0;
            for chunk in wire.chunks(step) {
                frames.scan(chunk);
                read += chunk.len();
                assert_eq!(frames.is_mid_head(), read < wire.len(), "step {step}, read {read}");
            }
        }
    }

    #[test]
    fn only_frames_of_requests_count_as_use_of_a_connection() {
        let mut frames = after_settings();
        let ping_ack = frames.scan(&frame(PING, ACK, 8));
        assert!(!ping_ack.is_in_use && ping_ack.has_ping_ack);
        assert!(!frames.scan(&frame(PING, 0, 8)).has_ping_ack);
        let settings_ack = frames.scan(&frame(SETTINGS, ACK, 0));
        assert!(!settings_ack.is_in_use && !settings_ack.has_ping_ack);
        assert!(!frames.scan(&frame(8, 0, 4)).is_in_use, "WINDOW_UPDATE");
        assert!(frames.scan(&frame(DATA, 0, 200)[..50]).is_in_use);
        assert!(!frames.is_mid_head(), "the rest of a body is not the rest of a head");
        assert!(!frames.scan(&[0; 50]).is_in_use);
    }

    #[test]
    fn half_a_frame_is_the_middle_of_a_head() {
        let mut frames = after_settings();
        frames.scan(&frame(HEADERS, END_HEADERS, 4)[..3]);
        assert!(frames.is_mid_head());
        frames.scan(&frame(HEADERS, END_HEADERS, 4)[3..10]);
        assert!(frames.is_mid_head());
        frames.scan(&[0; 3]);
        assert!(!frames.is_mid_head());
    }

    fn ends(wire: &[u8]) -> Option<usize> {
        let whole = (1..=wire.len()).find(|end| FirstHead::default().scan(&wire[..*end]));
        let mut head = FirstHead::default();
        let single = wire.chunks(1).position(|byte| head.scan(byte)).map(|at| at + 1);
        assert_eq!(whole, single, "split differently");
        whole
    }

    #[test]
    fn first_head_ends_at_the_empty_line_the_first_frame_or_a_tls_record() {
        let http1 = b"\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n";
        assert_eq!(ends(http1), Some(http1.len()));
        assert_eq!(ends(&http1[4..]), Some(http1.len() - 4));
        assert_eq!(ends(b"GET / HTTP/1.0\n\n"), Some(16));
        assert_eq!(ends(b"PROPFIND / HTTP/1.1\r\nhost: x\r\n\r"), None);
        assert_eq!(ends(b"PRI * HTTP/1.1\r\n\r\n"), Some(18));
        assert_eq!(ends(PREFACE), None);
        let mut http2 = PREFACE.to_vec();
        http2.extend(frame(SETTINGS, 0, 6));
        assert_eq!(ends(&http2), Some(http2.len()));
        assert_eq!(ends(&[TLS_HANDSHAKE, 3, 1]), Some(1));
        assert_eq!(ends(b""), None);
    }
}
