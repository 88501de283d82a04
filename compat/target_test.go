package compat_test

import (
	"tercet.dev/tercet/compat"
	"tercet.dev/tercet/compat/gateway"
)

func init() {
	compat.Target = func(addr string) compat.Upstream {
		t, err := gateway.ParseTarget(addr, "")
		if err != nil {
			panic(err)
		}
		return t
	}
}
