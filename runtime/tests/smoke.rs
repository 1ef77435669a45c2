//! smoke
use corelane_runtime::*;
use std::{
    io::*,
    os::fd::AsRawFd,
    sync::{Arc, atomic::*},
    time::*,
};
struct Echo {
    s: std::os::unix::net::UnixStream,
    fd: Option<FdId>,
    n: Arc<AtomicU64>,
    t: Arc<AtomicU64>,
}
impl Driver for Echo {
    type Message = u64;
    fn on_message(&mut self, cx: &mut Cx<'_>, m: u64) {
        self.n.store(m, Ordering::Release);
        if m >= 1_000_000 {
            let d = cx.now() + Duration::from_millis(5);
            cx.set_timer(d, m);
        }
    }
    fn on_fd(&mut self, _: &mut Cx<'_>, _: u64, _: Readiness) -> bool {
        let mut b = [0u8; 64];
        match self.s.read(&mut b) {
            Ok(n) if n > 0 => {
                self.s.write_all(&b[..n]).unwrap();
                true
            }
            _ => false,
        }
    }
    fn on_timer(&mut self, _: &mut Cx<'_>, t: u64) {
        self.t.store(t, Ordering::Release);
    }
    fn on_turn(&mut self, _: &mut Cx<'_>) -> bool {
        false
    }
    fn on_panic(&mut self, _: &str) {}
}
#[test]
fn smoke() {
    for assist in [AssistMode::Auto, AssistMode::Never] {
        for spin in [Spin::For(Duration::ZERO), Spin::default(), Spin::Forever] {
            for start in [Start::Hot, Start::Quiet] {
                let (a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
                a.set_nonblocking(true).unwrap();
                let (n, t) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
                let (n2, t2) = (n.clone(), t.clone());
                let lane =
                    Lane::start(LaneConfig { spin, assist, ..Default::default() }, move |cx| {
                        let fd = Some(cx.add_fd(a.as_raw_fd(), 7, Interest::READABLE, start));
                        Echo { s: a, fd, n: n2, t: t2 }
                    })
                    .unwrap();
                for i in 1..200u64 {
                    lane.submit(i).unwrap();
                    while n.load(Ordering::Acquire) != i {
                        lane.assist();
                    }
                    if i % 20 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                for i in 0..100u8 {
                    b.write_all(&[i]).unwrap();
                    let mut x = [0];
                    b.read_exact(&mut x).unwrap();
                    assert_eq!(x[0], i);
                    if i % 20 == 0 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
                for i in 0..5 {
                    let m = 1_000_000 + i;
                    let t0 = Instant::now();
                    lane.submit(m).unwrap();
                    while t.load(Ordering::Acquire) != m {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                    assert!(t0.elapsed() >= Duration::from_millis(5));
                    assert!(t0.elapsed() < Duration::from_millis(10), "{:?}", t0.elapsed());
                }
                let x = lane
                    .spawn(|l| async move {
                        let t0 = Instant::now();
                        l.sleep(Duration::from_millis(5)).await;
                        let a = t0.elapsed();
                        let t0 = Instant::now();
                        glommio::timer::sleep(Duration::from_millis(5)).await;
                        (a, t0.elapsed())
                    })
                    .wait()
                    .unwrap();
                println!("{assist:?} {spin:?} {start:?} {x:?} {:?}", lane.stats());
                lane.stop(Duration::from_secs(1)).unwrap();
                assert!(lane.submit(3).is_err());
                assert_eq!(lane.assist(), Assist::Stopped);
            }
        }
    }
}
