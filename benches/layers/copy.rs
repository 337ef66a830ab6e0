//! Opaque bytes between two connections: in memory, and through the kernel where both are plain TCP.

use criterion::{Criterion, Throughput};
use linkerd_stack::copy;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex},
    net::{TcpListener, TcpStream},
};

const SIZE: usize = 8 * 1024 * 1024;
const CHUNK: usize = 64 * 1024;

pub(crate) fn benches(c: &mut Criterion) {
    let runtime = crate::runtime();
    let mut group = c.benchmark_group("copy");
    group.throughput(Throughput::Bytes(SIZE as u64)).sample_size(10);
    group.bench_function("8_MiB_in_memory", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let ((client, a), (b, server)) = (duplex(CHUNK), duplex(CHUNK));
                tokio::join!(copy::duplex(a, b), send(client), receive(server)).0.unwrap()
            })
        });
    });
    group.bench_function("8_MiB_over_tcp", |b| {
        b.iter(|| {
            runtime.block_on(async {
                let ((client, a), (b, server)) = (tcp().await, tcp().await);
                tokio::join!(copy::duplex(a, b), send(client), receive(server)).0.unwrap()
            })
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("round_trip_over_tcp", |b| {
        let (mut client, mut server) = runtime.block_on(async {
            let ((client, a), (b, server)) = (tcp().await, tcp().await);
            tokio::spawn(copy::duplex(a, b));
            (client, server)
        });
        let mut buf = [0; 100];
        b.iter(|| {
            runtime.block_on(async {
                client.write_all(&[1; 100]).await.unwrap();
                server.read_exact(&mut buf).await.unwrap();
                server.write_all(&buf).await.unwrap();
                client.read_exact(&mut buf).await.unwrap();
            })
        });
    });
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// Sends [`SIZE`] bytes, finishes, and waits for the other side to.
async fn send(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let chunk = vec![b'x'; CHUNK];
    for _ in 0..SIZE / CHUNK {
        io.write_all(&chunk).await.unwrap();
    }
    io.shutdown().await.unwrap();
    assert_eq!(io.read(&mut [0]).await.unwrap(), 0);
}

async fn receive(mut io: impl AsyncRead + AsyncWrite + Unpin) {
    let (mut buf, mut sum) = (vec![0; CHUNK], 0);
    while sum < SIZE {
        sum += io.read(&mut buf).await.unwrap();
    }
    io.shutdown().await.unwrap();
}
