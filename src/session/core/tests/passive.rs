//! Peers that only connected to us: nothing is known by which to connect to them.

use std::time::Duration;

use super::world::{World, ms};
use crate::error::Error;
use crate::wire::hello::LinkKind;

#[test]
fn who_only_connected_to_us_refuses_notifications_once_it_has_left_and_until_it_is_back() {
    let refuses =
        |w: &World| matches!(w.nodes[1].peer.refuses(), Some(Error::RemoteDisconnect { .. }));
    let mut w = World::new(40, false);
    w.connect();
    assert!(!refuses(&w));
    w.leave(0, ms(100));
    w.run(ms(200));
    assert!(refuses(&w));
    // One that was on its way to the lane is counted.
    w.notify(1, b"late");
    assert_eq!(w.nodes[1].counters.notifications_dropped.get(), 1);
    w.connect();
    assert!(!refuses(&w));
    // A link that is lost is no end: the session may be resumed, and what was taken arrives.
    let wire = w.open_wires(LinkKind::Session)[0];
    w.cut(wire);
    w.run(ms(20));
    assert!(!refuses(&w));
    w.notify(1, b"kept");
    w.connect();
    w.run(ms(50));
    assert_eq!(w.take(0), [b"kept"]);
    w.assert_clean();
    // One that never comes back: its peer is forgotten after 30 s, and what was taken is counted then.
    w.kill(0);
    w.run(ms(100));
    w.notify(1, b"for nobody");
    w.run(Duration::from_secs(31));
    assert_eq!(w.nodes[1].counters.notifications_dropped.get(), 1, "not before it is forgotten");
    w.call(1, |core, env| core.abort(&Error::Cancelled, env));
    assert_eq!(w.nodes[1].counters.notifications_dropped.get(), 2);
    assert_eq!(w.nodes[1].peer.unacknowledged(), (0, 0));
}
