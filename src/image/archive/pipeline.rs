//! Reading ahead on a thread of its own.

use crossbeam_channel::{Receiver, Sender, bounded};
use std::{
    io::{self, Read},
    thread::JoinHandle,
};

const BUFFER: usize = 512 << 10;

/// Runs `reader` on a thread of its own, up to `depth` buffers of 512 KiB ahead, so that decompressing, hashing and
/// unpacking go on side by side. Errors come out where they happened in the stream. Dropping the result stops the
/// thread and waits for it: at most for the `read` it is in.
pub fn pipelined(reader: impl Read + Send + 'static, depth: usize) -> io::Result<impl Read + Send> {
    let depth = depth.max(1);
    let (full_in, full_out) = bounded(depth);
    let (free_in, free_out) = bounded(depth);
    for _ in 0..depth {
        free_in.send(vec![0; BUFFER]).expect("the channel holds them all");
    }
    let thread =
        std::thread::Builder::new().name("read-ahead".into()).spawn(move || produce(reader, &free_out, &full_in))?;
    Ok(Pipelined { channels: Some((full_out, free_in)), thread: Some(thread), current: Chunk::default(), at: 0 })
}

/// Part of the stream; an empty one is its end.
#[derive(Default)]
struct Chunk {
    buffer: Vec<u8>,
    len: usize,
}

type Message = io::Result<Chunk>;

struct Pipelined {
    channels: Option<(Receiver<Message>, Sender<Vec<u8>>)>,
    thread: Option<JoinHandle<()>>,
    current: Chunk,
    at: usize,
}

fn produce(mut reader: impl Read, free: &Receiver<Vec<u8>>, full: &Sender<Message>) {
    while let Ok(mut buffer) = free.recv() {
        let (len, error) = fill(&mut reader, &mut buffer);
        let done = len < buffer.len();
        // What came before an error is passed on first: a consumer sees the stream as it was.
        if len > 0 && full.send(Ok(Chunk { buffer, len })).is_err() {
            return;
        }
        if done {
            let _ = full.send(error.map_or(Ok(Chunk::default()), Err));
            return;
        }
    }
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut len = 0;
    while len < buffer.len() {
        match reader.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return (len, Some(e)),
        }
    }
    (len, None)
}

impl Read for Pipelined {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.current.len {
            let Some((full, free)) = &self.channels else { return Ok(0) };
            let spent = std::mem::take(&mut self.current).buffer;
            self.at = 0;
            if !spent.is_empty() {
                // The producer may be at its end and gone.
                let _ = free.send(spent);
            }
            self.current = match full.recv() {
                Ok(next) => next?,
                Err(_) => return Err(io::Error::other("the thread that reads ahead has stopped")),
            };
            if self.current.len == 0 {
                self.channels = None;
                return Ok(0);
            }
        }
        let n = buf.len().min(self.current.len - self.at);
        buf[..n].copy_from_slice(&self.current.buffer[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Drop for Pipelined {
    fn drop(&mut self) {
        self.channels = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was seen by the consumer as an error.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    };

    #[test]
    fn what_goes_in_comes_out() {
        for size in [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 5 * BUFFER + 7] {
            let data: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
            let mut out = Vec::new();
            pipelined(io::Cursor::new(data.clone()), 2).unwrap().read_to_end(&mut out).unwrap();
            assert!(out == data, "{size}");
        }
    }

    #[test]
    fn an_error_comes_after_the_data_before_it_and_the_stream_does_not_end_well() {
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("bad sector"))
            }
        }
        let mut reader = pipelined(io::Cursor::new(vec![7; 10]).chain(Fails), 2).unwrap();
        let mut out = Vec::new();
        assert_eq!(reader.read_to_end(&mut out).unwrap_err().to_string(), "bad sector");
        assert_eq!(out, [7; 10]);
        assert!(reader.read(&mut [0]).is_err());
    }

    #[test]
    fn a_panic_of_the_producer_is_an_error_and_not_an_end() {
        struct Panics;
        impl Read for Panics {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("on purpose")
            }
        }
        assert!(pipelined(Panics, 1).unwrap().read(&mut [0]).is_err());
    }

    #[test]
    fn dropping_the_consumer_stops_the_producer() {
        struct Endless(Arc<AtomicU64>);
        impl Read for Endless {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.0.fetch_add(1, Ordering::SeqCst);
                Ok(buf.len())
            }
        }
        impl Drop for Endless {
            fn drop(&mut self) {
                self.0.fetch_add(1 << 32, Ordering::SeqCst);
            }
        }
        let reads = Arc::new(AtomicU64::new(0));
        let mut reader = pipelined(Endless(reads.clone()), 3).unwrap();
        reader.read_exact(&mut [0; 1000]).unwrap();
        drop(reader);
        let reads = reads.load(Ordering::SeqCst);
        assert!(reads >> 32 == 1, "the producer is gone, with its reader");
        assert!(reads as u32 <= 4, "and never read more than it had buffers: {}", reads as u32);
    }
}
