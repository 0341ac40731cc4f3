package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const dialTimeout = 10 * time.Second

// serve accepts until the listener is closed.
func (s *sidecar) serve(ln net.Listener, direction string, dst func(*net.TCPConn) (netip.AddrPort, error)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			s.log(event{Event: "failed", Direction: direction, Detail: err.Error()})
			time.Sleep(50 * time.Millisecond) // out of descriptors: let some close
			continue
		}
		go s.proxy(c.(*net.TCPConn), direction, dst)
	}
}

// proxy carries one connection to where it was going.
func (s *sidecar) proxy(client *net.TCPConn, direction string, dst func(*net.TCPConn) (netip.AddrPort, error)) {
	defer client.Close()
	e := event{Event: "open", Direction: direction, Client: client.RemoteAddr().String()}
	to, err := dst(client)
	if err != nil {
		e.Event, e.Detail = "failed", err.Error()
		s.log(e)
		return
	}
	e.Original = to.String()
	// Somebody dialled the listener itself: nothing was redirected, and dialling
	// on would come back here for ever.
	own := to == addrPort(client.LocalAddr())
	if s.isTransparent(direction) {
		own = to.Port() == s.inbound // there the two addresses are always the same
	}
	if own {
		e.Event, e.Detail = "refused", "dialled the proxy's own port; nothing to pass on"
		s.log(e)
		return
	}
	s.log(e)

	d := net.Dialer{Timeout: dialTimeout}
	if s.keepClient && s.isTransparent(direction) {
		// The client's address with a port of its own: with the client's port the
		// connection would be the very one that the proxy has accepted.
		d.LocalAddr = &net.TCPAddr{IP: client.RemoteAddr().(*net.TCPAddr).IP}
		d.Control = transparent
	}
	d.SetMultipathTCP(false)
	server, err := d.Dial("tcp", to.String())
	if err != nil {
		e.Event, e.Detail = "failed", err.Error()
		s.log(e)
		return
	}
	defer server.Close()
	splice(client, server.(*net.TCPConn))
}

// splice copies both ways and passes each end's close on.
func splice(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	half := func(dst, src *net.TCPConn) {
		if _, err := io.Copy(dst, src); err != nil {
			dst.Close() // broken, not ended: say so to the other end
			return
		}
		dst.CloseWrite()
	}
	wg.Go(func() { half(a, b) })
	wg.Go(func() { half(b, a) })
	wg.Wait()
}

func (s *sidecar) isTransparent(direction string) bool { return s.tproxy && direction == "inbound" }

// inboundDst is where a connection to the pod was going: with TPROXY the
// accepted socket carries that address as its own.
func (s *sidecar) inboundDst(c *net.TCPConn) (netip.AddrPort, error) {
	if s.tproxy {
		return addrPort(c.LocalAddr()), nil
	}
	return originalDst(c)
}

// originalDst asks conntrack where a connection was going before NAT. For one
// that was not redirected, that is the listener's own address.
func originalDst(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	var to netip.AddrPort
	ctlErr := raw.Control(func(fd uintptr) {
		if addrPort(c.LocalAddr()).Addr().Is4() {
			var sa unix.RawSockaddrInet4
			if err = getsockopt(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err == nil {
				to = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), ntohs(sa.Port))
			}
			return
		}
		var sa unix.RawSockaddrInet6
		// IP6T_SO_ORIGINAL_DST has the number of its IPv4 brother.
		if err = getsockopt(fd, unix.SOL_IPV6, unix.SO_ORIGINAL_DST, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err == nil {
			to = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), ntohs(sa.Port))
		}
	})
	if err = errors.Join(ctlErr, err); err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOPROTOOPT) {
			return addrPort(c.LocalAddr()), nil // conntrack does not know it: no NAT took place
		}
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	return to, nil
}

func getsockopt(fd uintptr, level, name int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(p), uintptr(unsafe.Pointer(&n)), 0); errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}

// ntohs reads a port as the kernel stores it in a sockaddr.
func ntohs(p uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&p))
	return uint16(b[0])<<8 | uint16(b[1])
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// transparent lets a socket listen on, or dial from, addresses that are not
// the pod's.
func transparent(network, _ string, c syscall.RawConn) error {
	var err error
	ctlErr := c.Control(func(fd uintptr) {
		level, name := unix.SOL_IP, unix.IP_TRANSPARENT
		if network[len(network)-1] == '6' {
			level, name = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
		}
		err = os.NewSyscallError("setsockopt IP_TRANSPARENT", unix.SetsockoptInt(int(fd), level, name, 1))
	})
	return errors.Join(ctlErr, err)
}
