import httpx2, pytest
from pgshelf_client import *
async def test_smoke(client):
    async with AsyncClient("http://testserver", transport=client._transport) as s:
        print(await s.health()); print(await s.ready())
        print(await s.create_library("handbook", metadata={"a":1}))
        d = await s.add_document("handbook", key="a/b ü..", title="T", text="Vacuum reclaims dead rows.", metadata={"x": 1})
        print(d)
        assert (await s.get_document("handbook", "a/b ü..")) == d
        for key in ("..", ".", "%2F", "a?b#c"):
            await s.put_document("handbook", key, text="Rows.")
            assert (await s.get_document("handbook", key)).key == key
            await s.delete_document("handbook", key)
        d2 = await s.update_document("handbook", d.id, title=None, metadata={"x": None, "y": 2}, if_match=d.version)
        assert d2.title is None and d2.metadata == {"y": 2}
        with pytest.raises(Conflict) as e: await s.update_document("handbook", d.id, title="x", if_match=d.version)
        print(e.value)
        (c,) = [c async for c in s.chunks("handbook", d.id, include=["embedding"])]
        assert len(c.embedding) == 256
        assert (await s.get_chunk("handbook", c.id, include="embedding")).embedding == c.embedding
        assert (await s.get_chunk("handbook", c.id)).embedding is None
        print(await s.update_chunk("handbook", c.id, metadata={"k": 1}))
        r = await s.search("handbook", vector=c.embedding, include=["embedding", "document"]); print(r.took_ms, r.hits[0].score, r.hits[0].text)
        print((await s.search("handbook", "free space")).hits[0])
        with pytest.raises(Unprocessable) as e: await s.search("handbook", vector=[1.0])
        print(e.value)
        with pytest.raises(BadRequest) as e: await s.search("handbook", "x", k=0)
        print(e.value, e.value.errors)
        print(await s.library_stats("handbook"))
        print([l.name async for l in s.libraries(page_size=1)], [x.key async for x in s.documents("handbook", page_size=1)])
        print(await s.update_library("handbook", name="book", description="d"))
        await s.delete_chunk("book", c.id); await s.delete_document("book", d.id); await s.delete_library("book")
        with pytest.raises(NotFound) as e: await s.get_library("book")
        print(e.value)
